"""A linear layer whose weight has four bits per element.

The codes and their scales are ordinary parameters, so they are sharded, moved, copied and deferred like others. This
file decides how the layer multiplies with them and how it looks from outside. `loading4bit` decides the allowed content
of a state dict. `packing` decides the order of the codes in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nucleate.checkpoint import StoredSources
from nucleate.deferred import ElementSource, eager, record_of
from nucleate.errors import ConfigurationError, UsageError
from nucleate_bitsandbytes.layers.four_bit_weight import (
    DTYPES,
    NESTED_BLOCKSIZE,
    FourBitWeight,
    nested_quant_map,
    packed_values,
    quant_map,
)
from nucleate_bitsandbytes.layers.frozen import (
    compute_input,
    frozen,
    kept_apply,
    refuse_cast,
    refuse_mismatch,
    refuse_sharded,
    trained,
    uncompiled,
)
from nucleate_bitsandbytes.layers.lazy import take4bit
from nucleate_bitsandbytes.layers.loading4bit import load_weight
from nucleate_bitsandbytes.layers.packing import can_pack, is_packed, pack, packed_linear, packed_scales, unpack
from nucleate_bitsandbytes.layers.products import Product4bit, dequantized4bit, scales4bit
from nucleate_bitsandbytes.layers.quantized import FourBitLinear
from nucleate_bitsandbytes.library import bitsandbytes

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

#: The names of the statistics as parameters; in a state dict they have the prefix `weight.`.
_STATISTICS = ("absmax", "nested_absmax")


class Linear4bit(FourBitLinear):
    """A layer that computes `input @ weight.T + bias` for a frozen weight of four bits per element.

    Outputs, gradients and state dict are bit-identical to those of `bitsandbytes.nn.Linear4bit`, except where the
    latter depends on earlier calls or destroys something. In eval mode on CPUs with AVX512-BF16, bitsandbytes' layer
    always computes in bfloat16. This layer uses the same kernel only if bfloat16 is the compute dtype.

    Args:
        in_features: The number of columns of the weight.
        out_features: The number of rows of the weight.
        weight: The quantized weight. Its tensors may be deferred: the constructor reads no value.
        bias: `(out_features,)`. It trains if it is a parameter that requires gradients.
        compute_dtype: The dtype to multiply in; None takes autocast's, or else the input's.

    Raises:
        ConfigurationError: The weight does not have that shape, or no kernel computes in `compute_dtype`.
    """

    fixed_dtype = ("weight", "absmax", "nested_absmax")
    #: The scales in the kernel's form, and the tensors that they were made from.
    _scales: tuple[tuple[Any, ...], Tensor] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weight: FourBitWeight,
        bias: Tensor | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear.__init__ would make a weight
        if compute_dtype not in (None, *DTYPES):
            raise ConfigurationError(
                f"compute_dtype={compute_dtype} must be None or one of {', '.join(map(str, DTYPES))}."
            )
        weight.check((out_features, in_features))
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ConfigurationError(f"bias has the shape {tuple(bias.shape)} instead of {(out_features,)}.")
        self.in_features = in_features
        self.out_features = out_features
        self.compute_dtype = compute_dtype
        self.weight = frozen(weight.codes)
        self.take_statistics(weight)
        self.register_parameter("bias", None if bias is None else trained(bias))

    def take_statistics(self, weight: FourBitWeight) -> None:
        self.quant_type = weight.quant_type
        self.blocksize = weight.blocksize
        self.quantized_dtype = weight.dtype
        self.absmax = frozen(weight.absmax)
        self.register_parameter("nested_absmax", None if weight.nested_absmax is None else frozen(weight.nested_absmax))
        # Persistent, although a state dict has it as text: libraries assume that constructors compute other buffers.
        self.register_buffer("nested_offset", weight.offset)
        self._scales = None

    # -- the weight ----------------------------------------------------------------------------------------

    @property
    def quantized(self) -> FourBitWeight:
        """The quantized weight in its current state; its parameters may be sharded."""
        self._put_in_order()
        return self._described()

    def _described(self) -> FourBitWeight:
        return FourBitWeight(
            codes=self.weight,
            absmax=self.absmax,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            dtype=self.quantized_dtype,
            nested_absmax=self.nested_absmax,
            offset=self.nested_offset,
        )

    @property
    def quant_state(self) -> QuantState:
        """The statistics in the form that bitsandbytes' functions take, made from the current tensors at each call.

        Raises:
            UsageError: The weight is sharded now.
        """
        refuse_sharded(self.weight)
        refuse_cast(self, self.absmax, torch.uint8 if self.nested else torch.float32)
        state_type: type[QuantState] = bitsandbytes().functional.QuantState
        shape = torch.Size((self.out_features, self.in_features))
        state: dict[str, Any] = {
            "shape": shape,
            "code": quant_map(self.quant_type, self.absmax.device),
            "blocksize": self.blocksize,
        }
        state.update(quant_type=self.quant_type, dtype=self.quantized_dtype)
        if not self.nested:
            return state_type(self.absmax, **state)
        nested = state_type(
            self.nested_absmax,
            code=nested_quant_map(self.absmax.device),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
        return state_type(self.absmax, offset=self.nested_offset, state2=nested, **state)

    def dequantize(self) -> Tensor:
        """Return the dequantized weight `(out_features, in_features)`, in the dtype that it was quantized from.

        Raises:
            UsageError: The weight is sharded now.
        """
        state = self.quant_state
        return dequantized4bit(self._put_in_order(), state)

    def _put_in_order(self) -> Tensor:
        """Return the codes in the saved order, and keep them so until the kernel needs its own order."""
        if is_packed(self.weight):
            # Tensors that were handed out in the packed order keep their memory: nothing is overwritten.
            with torch.inference_mode(False), torch.no_grad():
                self.weight.data = unpack(self.weight.data)
        self._scales = None
        return self.weight

    def _packed(self) -> Tensor:
        """Return the codes in the kernel's order, and keep them in this order."""
        codes = self.weight.data
        if is_packed(codes):
            return codes
        with torch.inference_mode(False), torch.no_grad():
            packed = pack(codes, (self.out_features, self.in_features))
            if not self.is_sharded:
                self.weight.data = packed
        return packed

    # -- compute -------------------------------------------------------------------------------------------

    @uncompiled
    def forward(self, input: Tensor) -> Tensor:
        """Compute `input @ weight.T + bias` in the compute dtype.

        Args:
            input: `(..., in_features)`.

        Returns:
            `(..., out_features)`, in the dtype of the input.

        Raises:
            UsageError: The input has a wrong width, device or dtype, or the weight is sharded now.
        """
        refuse_mismatch(self, input)
        refuse_sharded(self.weight)
        values = compute_input(input, self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(values.dtype)
        if not input.numel():
            # The output is in autograd's graph, as with nn.Linear.
            zeros = values.new_zeros(1, 1).expand(self.out_features, self.in_features)
            return nn.functional.linear(values, zeros, bias).to(input.dtype)
        if self._uses_kernel(values):
            by_kernel = self._product_by_kernel(values)
            return (by_kernel if bias is None else by_kernel + bias).to(input.dtype)
        codes = self._put_in_order().detach()
        product: Tensor = Product4bit.apply(values, bias, codes, self.quant_state)  # type: ignore[no-untyped-call]
        return product.to(input.dtype)

    def _uses_kernel(self, values: Tensor) -> bool:
        return (
            not self.training
            and values.dtype == torch.bfloat16
            and values.device.type == "cpu"
            and not values.requires_grad
            and can_pack((self.out_features, self.in_features), self.blocksize)
        )

    def _product_by_kernel(self, values: Tensor) -> Tensor:
        state = self.quant_state
        packed = self._packed()
        tensors = [t for t in (state.absmax, self.nested_absmax, self.nested_offset) if t is not None]
        made_from = tuple((id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors)
        scales = self._scales
        if scales is None or scales[0] != made_from or self.is_sharded:
            with torch.inference_mode(False), torch.no_grad():
                scales = (made_from, packed_scales(scales4bit(state), self.out_features))
            if not self.is_sharded:
                self._scales = scales
        shape = (self.out_features, self.in_features)
        return packed_linear(values, packed, scales[1], state.code, shape, self.blocksize)

    # -- as a module ---------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, DTensor):
            self.__dict__["is_sharded"] = True
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._put_in_order()
        kept = [self.weight, self.absmax, self.nested_absmax, self.nested_offset]
        super()._apply(kept_apply(fn, kept), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> Any:
        self._put_in_order()
        return super().__getstate__()  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._put_in_order()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        held = {name: destination.pop(prefix + name, None) for name in (*_STATISTICS, "nested_offset")}
        device = self.absmax.device
        destination[f"{prefix}weight.absmax"] = held["absmax"]
        # Clones, because safetensors refuses tensors that share memory.
        destination[f"{prefix}weight.quant_map"] = quant_map(self.quant_type, device).clone()
        if self.nested:
            destination[f"{prefix}weight.nested_absmax"] = held["nested_absmax"]
            destination[f"{prefix}weight.nested_quant_map"] = nested_quant_map(device).clone()
            if self.nested_offset is not None and record_of(self.nested_offset) is not None:
                return  # the values below are not known before the offset is materialized
        with eager(), torch.device("cpu"):
            values = packed_values(self._described(), (self.out_features, self.in_features))
            destination[f"{prefix}weight.quant_state.bitsandbytes__{self.quant_type}"] = (
                bitsandbytes().utils.pack_dict_to_tensor(values)
            )

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, *lists: Any
    ) -> None:
        self._put_in_order()
        with torch.no_grad():
            state_dict = load_weight(self, state_dict, prefix, local_metadata, *lists)
        if state_dict is not None:
            if self.nested_offset is not None:
                state_dict[f"{prefix}nested_offset"] = self.nested_offset
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def bind_stored(self, stored: Mapping[str, ElementSource]) -> StoredSources:
        """Return the element sources for this layer, from a checkpoint whose tensors are still in its files."""
        self._put_in_order()
        return take4bit(self, stored)

    def reset_parameters(self) -> None:
        """Refuse to initialize: a quantized weight cannot be initialized in place.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            "the weight of a 4-bit layer is quantized and cannot be initialized. Initialize before `setup`."
        )

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does, and add its format."""
        nested = "-dq" if self.nested else ""
        compute = "" if self.compute_dtype is None else f", compute_dtype={self.compute_dtype}"
        return f"{super().extra_repr()}, {self.quant_type}{nested}, blocksize={self.blocksize}{compute}"
