"""Functions that are recorded whole, because torch computes them in another way on the meta device.

Some functions consist of operations that depend on the device. oneDNN's LSTM and fused attention exist on a CPU only,
and give other last bits than the operations that replace them elsewhere. Autocast does not change meta tensors. Other
functions read memory. The recorder runs such a function once on real values, and records it as one step on the tape.
Its gradients are made the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nucleate.deferred.recording.op_schema import OpSchema
from nucleate.deferred.tape.leaves import map_leaves, tensors
from nucleate.devices import default_generator

if TYPE_CHECKING:
    from nucleate.deferred.recording.recorder import Recorder

_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_SOBOL = {
    torch._sobol_engine_initialize_state_, torch._sobol_engine_scramble_, torch._sobol_engine_ff_,
    torch._sobol_engine_draw,
}  # fmt: skip
_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}
# In C++, torch looks at the kind of device and takes kernels that the CPU and the meta device do not have: one kernel
# for dropout (`is_fused_kernel_acceptable` in aten/src/ATen/native/Dropout.cpp, 2.13), cuDNN for the others. No mode of
# ours sees the calls inside a function of `torch.nn.functional`.
_DROPOUT = {torch.dropout, F.dropout}
# The names of their first arguments. The last one says whether running statistics are written.
_WITH_STATISTICS: dict[Any, tuple[str, ...]] = {
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
    torch.instance_norm: ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats"),
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training"),
    F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats"),
}
_BY_DEVICE = {
    *_DROPOUT, *_WITH_STATISTICS, torch.rms_norm, torch.ctc_loss, torch.grid_sampler, F.rms_norm, F.ctc_loss,
    F.grid_sample,
}  # fmt: skip


# These compute singular values and eigenvalues in another way while a dispatch mode is active (`isTensorSubclassLike`
# in aten/src/ATen/native/BatchLinearAlgebra.cpp, 2.13).
_SPECTRAL = {
    torch.linalg.svdvals, torch.linalg.eigvals, torch.linalg.eigvalsh, torch.linalg.cond, torch.linalg.matrix_rank,
    torch.linalg.norm, torch.linalg.matrix_norm, torch.nuclear_norm,
}  # fmt: skip
_VECTOR_ORDS = (None, "fro", 0, 1, -1, float("inf"), -float("inf"))


def is_whole(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> bool:
    """Return whether a function call has to be recorded whole.

    Args:
        func: The function that a torch function mode received.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        device: The device that deferred tensors stand for.
    """
    if func is torch.norm or func is Tensor.norm:
        if kwargs.get("p", args[1] if len(args) > 1 else None) == "nuc":
            return True
    elif func in _SPECTRAL:
        is_norm = func is torch.linalg.norm or func is torch.linalg.matrix_norm
        order = kwargs.get("ord", args[1] if len(args) > 1 else None)
        if "out" not in kwargs and not (is_norm and order in _VECTOR_ORDS):
            return True
    if func in _RECURRENT or func in _SOBOL or func in _ATTENTION or func is torch.unravel_index:
        return True
    if device.type != "cpu" and func in _BY_DEVICE:
        # `call_whole` keeps no gradient for a function that writes its arguments.
        return not _traits(func, args, kwargs).mutated or not _is_tracked(args, kwargs)
    return torch.is_autocast_enabled(device.type) and _is_cast(func, device)


def _is_tracked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors((args, kwargs)))


def _is_cast(func: Any, device: torch.device) -> bool:
    """Return whether autocast changes the dtype that a function computes in."""
    name = getattr(func, "__name__", "").strip("_")
    return _has_kernel(name, f"Autocast{torch._C._dispatch_key_for_device(device.type)}")


@functools.cache
def _has_kernel(name: str, key: str) -> bool:
    packet = getattr(torch.ops.aten, name, None)
    # Kernels are registered for some of the overloads, such as `softmax.int`.
    return packet is not None and any(_has_overload_kernel(name, overload, key) for overload in packet.overloads())


def _has_overload_kernel(name: str, overload: str, key: str) -> bool:
    full = f"aten::{name}" if overload == "default" else f"aten::{name}.{overload}"
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(full, key))
    except RuntimeError:
        return False  # Only TorchScript has this overload.


def call_whole(recorder: Recorder, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function, and record it as one step."""
    given = tensors((args, kwargs))
    replayed = _Replayed(func, recorder.device)
    schema = _traits(func, args, kwargs)
    if not schema.mutated:
        replayed.wanted = [tensor.requires_grad for tensor in given]
    if schema.mutated or not torch.is_grad_enabled() or not any(replayed.wanted):
        with torch._C._AutoDispatchBelowAutograd():
            return recorder.record(replayed, schema, args, kwargs)
    replayed.tracks = True
    structure: list[Any] = []
    outputs = _Differentiable.apply(  # type: ignore[no-untyped-call]
        recorder, replayed, schema, (args, kwargs), structure, *given
    )
    found = iter(outputs)
    return map_leaves(structure[0], lambda leaf: next(found) if isinstance(leaf, Tensor) else leaf)


class _Replayed:
    """A function with the modes under which it was called.

    Args:
        func: The function.
        device: The device that deferred tensors stand for.
    """

    def __init__(self, func: Callable[..., Any], device: torch.device) -> None:
        self.func = func
        #: Whether each tensor among the arguments requires a gradient; empty if the function writes them. This decides
        #: how torch multiplies matrices, also where no gradient is tracked (`should_fold` in
        #: aten/src/ATen/native/LinearAlgebra.cpp, torch 2.13). Not every CPU gives the same bits in both ways.
        self.wanted: list[bool] = []
        #: Whether gradients are tracked.
        self.tracks = False
        self.__qualname__ = func.__qualname__
        self._autocast: tuple[str, torch.dtype] | None = None
        if torch.is_autocast_enabled(device.type):
            self._autocast = device.type, torch.get_autocast_dtype(device.type)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not any(self.wanted):
            return self.run(args, kwargs)
        wanted = iter(self.wanted)
        args, kwargs = map_leaves(
            (args, kwargs),
            lambda leaf: leaf.detach().requires_grad_(next(wanted)) if isinstance(leaf, Tensor) else leaf,
        )
        with torch.set_grad_enabled(self.tracks):
            result = self.run(args, kwargs)
        return map_leaves(result, lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the function under the modes of the recorded call."""
        with ExitStack() as stack:
            if self._autocast is not None:
                stack.enter_context(torch.autocast(self._autocast[0], self._autocast[1], cache_enabled=False))
            return self.func(*args, **kwargs)


class _Gradient:
    """The gradients of a function with respect to its tensors, computed from values."""

    def __init__(self, replayed: _Replayed, call: tuple[tuple[Any, ...], dict[str, Any]], wanted: list[bool]) -> None:
        self._replayed = replayed
        # Each call passes the tensors in. Only their places are kept here.
        self._call = map_leaves(call, lambda leaf: _Place if isinstance(leaf, Tensor) else leaf)
        self.wanted = wanted
        #: The generator's state before the function drew from it.
        self.state: Tensor | None = None
        self.__qualname__ = f"gradient of {replayed.__qualname__}"

    def __call__(self, gradients: list[Tensor | None], values: list[Tensor]) -> list[Tensor]:
        if self.state is not None:
            default_generator(values[0].device).set_state(self.state)
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_(wanted) for value, wanted in zip(values, self.wanted, strict=True)]
            rest = iter(leaves)
            args, kwargs = map_leaves(self._call, lambda leaf: next(rest) if leaf is _Place else leaf)
            results = tensors(self._replayed.run(args, kwargs))
        pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and r.requires_grad]
        inputs = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


class _Place:
    """The mark for the place of a tensor among arguments."""


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recorder: Recorder,
        replayed: _Replayed,
        schema: OpSchema,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        structure: list[Any],
        *given: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.recorder = recorder
        ctx.gradient = _Gradient(replayed, call, [bool(t.requires_grad) for t in given])
        if schema.is_random:
            ctx.gradient.state = recorder.random_state()
        structure.append(recorder.record(replayed, schema, *call))
        ctx.save_for_backward(*given)
        return tuple(tensors(structure[0]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = ctx.saved_tensors
        found = iter(ctx.recorder.record(ctx.gradient, _PURE, (list(gradients), list(given)), {}))
        return (None,) * 5 + tuple(next(found) if wanted else None for wanted in ctx.gradient.wanted)


class _WholeTraits(OpSchema):
    """The facts that a recorder needs about a function that is not an aten operation."""

    def __init__(self, mutated: list[tuple[int, str, bool]], is_random: bool) -> None:
        self.mutated = mutated
        self.is_random = is_random
        self.fills = self.uninitialized = self.retargets = self.device = self.indexes = False
        self.wrong_on_meta = self.looks_at_values = True


_PURE = _WholeTraits([], False)


def _traits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> OpSchema:
    if func in _RECURRENT:
        # (..., has_biases, num_layers, dropout, train, bidirectional[, batch_first])
        numbers = [arg for arg in args if isinstance(arg, (bool, int, float))]
        return _WholeTraits([], any(type(number) is float and number > 0 for number in numbers))
    if func is F.scaled_dot_product_attention:
        return _WholeTraits([], kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0)
    if func is F.multi_head_attention_forward:
        training = kwargs.get("training", args[13] if len(args) > 13 else True)
        return _WholeTraits([], training and kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0) > 0)
    if func in _DROPOUT:
        named = _named(("input", "p", "train" if func is torch.dropout else "training", "inplace"), args, kwargs)
        is_random = named.get("train", named.get("training", True)) and named.get("p", 0.5) > 0
        return _WholeTraits([(0, "input", False)] if named.get("inplace") else [], bool(is_random))
    if func in _WITH_STATISTICS:
        names = _WITH_STATISTICS[func]
        named = _named(names, args, kwargs)
        places = [names.index("running_mean"), names.index("running_var")]
        held = [(place, names[place], False) for place in places if named.get(names[place]) is not None]
        return _WholeTraits(held if named.get(names[-1], func is F.instance_norm) else [], False)
    name = getattr(func, "__name__", "")
    is_in_place = name.endswith("_") and not name.endswith("__")
    return _WholeTraits([(0, "self", False)] if is_in_place else [], False)


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | kwargs
