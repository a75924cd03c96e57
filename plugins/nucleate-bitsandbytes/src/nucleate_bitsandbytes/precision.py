"""The bitsandbytes precision: it quantizes linear layers, and keeps all other parameters in a compute dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, final

import torch
from torch import nn

from nucleate.deferred import ElementSource
from nucleate.errors import ConfigurationError
from nucleate.precision import FullPrecision, HalfPrecision, Precision
from nucleate_bitsandbytes.options import Options

MODES = ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")


@final
class BitsandbytesPrecision(Precision):
    """A precision that quantizes linear layers with the formats of bitsandbytes.

    `setup` replaces the layers while the model is deferred. Each weight is quantized while it is read or made, a few
    rows at a time, so it never exists whole in full precision. The weights are frozen, except in mode
    `"int8-training"`. If you freeze layers of the model first, only frozen layers are quantized. So adapters train, of
    PEFT or your own, and so do layers that you left trainable. If nothing is frozen, all layers are quantized, with a
    warning. `"int8-training"` freezes nothing and takes all layers, frozen or not.

    Args:
        mode: `"nf4"` or `"fp4"`: 4 bits for each weight and a scale for each 64 (QLoRA, arXiv:2305.14314); with
            `"-dq"` the scales are quantized too. `"int8"`: 8 bits and a scale for each row (LLM.int8(),
            arXiv:2208.07339). `"int8-training"`: weights stay in `compute_dtype` and train; only the product is
            computed in 8 bits.
        compute_dtype: bfloat16, float16 or float32. Weights are quantized from this dtype, products are computed in
            it, and all other parameters have it.
        skip: Names of modules that are not quantized, see `nucleate_bitsandbytes.selection.linears_of`. By default
            `"lm_head"`, and the head of a transformers model. Layers tied to others are never quantized.
        blocksize: The number of weights that share a scale in the 4-bit modes.
        threshold: In the 8-bit modes, input columns with a magnitude of at least this are computed in full; 0 turns
            this off.

    Raises:
        ConfigurationError: An argument has a value that is not allowed.
    """

    def __init__(
        self,
        mode: str = "nf4",
        *,
        compute_dtype: torch.dtype = torch.bfloat16,
        skip: Sequence[str] | None = None,
        blocksize: int = 64,
        threshold: float = 6.0,
    ) -> None:
        if mode not in MODES:
            raise ConfigurationError(f"BitsandbytesPrecision has no mode {mode!r}; it has {', '.join(MODES)}.")
        if compute_dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ConfigurationError(
                f"compute_dtype={compute_dtype} must be torch.bfloat16, torch.float16 or torch.float32."
            )
        if isinstance(skip, str):
            raise ConfigurationError(f"skip={skip!r} must be a list of names, such as [{skip!r}].")
        if blocksize not in (64, 128, 256, 512, 1024, 2048, 4096):
            raise ConfigurationError(f"blocksize={blocksize!r} must be a power of two from 64 to 4096.")
        if not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise ConfigurationError(
                f"threshold={threshold!r} must be a number of at least 0; 0 computes every column in 8 bits."
            )
        self.name = f"bnb-{mode}"
        self.mode = mode
        self.skip = None if skip is None else tuple(skip)
        self.blocksize = blocksize
        self.threshold = threshold
        # This precision handles everything except the linear layers.
        full = compute_dtype == torch.float32
        self._base: Precision = FullPrecision(compute_dtype) if full else HalfPrecision(compute_dtype)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the precision from a name such as `"bnb-nf4"`."""
        return cls(name.removeprefix("bnb-"))

    def __repr__(self) -> str:
        # Ranks compare this text: shards that two ranks quantize in two ways do not form one weight.
        return (
            f"BitsandbytesPrecision({self.mode!r}, compute_dtype={self.dtype}, skip={self.skip}, "
            f"blocksize={self.blocksize}, threshold={self.threshold})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self._base.dtype

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which factories make floating point tensors of the compute dtype."""
        return self._base.module_init_context()

    def setup(self, model: nn.Module) -> nn.Module:
        """Cast the parameters of `model` and replace its linear layers by quantized ones, in place.

        Raises:
            ConfigurationError: A name in `skip` does not match any module of the model.
            ConversionError: A real weight has values that are not finite. For a deferred weight, this error comes when
                the weight is materialized.
        """
        from nucleate_bitsandbytes.replacement import quantize

        self._base.setup(model)
        return quantize(model, self._options())

    def before_load(self, model: nn.Module, stored: Mapping[str, ElementSource]) -> None:
        """Replace the linear layers for which a checkpoint holds quantized weights.

        Raises:
            CheckpointError: The checkpoint's quantized weights do not fit this precision.
        """
        from nucleate_bitsandbytes.replacement import prepare

        prepare(model, self._options(), stored)

    def _options(self) -> Options:
        return Options(self.name, self.mode, self.dtype, self.skip, self.blocksize, self.threshold)

    def quantization_config(self, model: nn.Module) -> dict[str, Any] | None:
        """Return the content of a `BitsAndBytesConfig` of transformers; None for a mode that stores floats."""
        if self.mode == "int8-training":
            return None
        config: dict[str, Any] = {
            "quant_method": "bitsandbytes",
            "load_in_8bit": self.mode == "int8",
            "load_in_4bit": self.mode != "int8",
            "llm_int8_threshold": self.threshold,
            # Without a list, transformers would search for the head itself.
            "llm_int8_skip_modules": [fqn for fqn, module in model.named_modules() if type(module) is nn.Linear],
        }
        if self.mode != "int8":
            config["bnb_4bit_quant_type"] = self.mode.removesuffix("-dq")
            config["bnb_4bit_use_double_quant"] = self.mode.endswith("-dq")
            config["bnb_4bit_compute_dtype"] = str(self.dtype).removeprefix("torch.")
        return config

    def forward_context(self) -> AbstractContextManager[object]:
        """Return the context that surrounds forward."""
        return self._base.forward_context()

    def convert_input(self, data: Any) -> Any:
        """Cast floating point tensors to the compute dtype."""
        return self._base.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """Cast floating point tensors to the default dtype."""
        return self._base.convert_output(data)
