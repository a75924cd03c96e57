"""The step of an optimizer on DTensors, where torch's optimizers need help.

The fused kernels of SGD and Adagrad do not take DTensors, so these optimizers step without them. A kernel for many
tensors takes plain tensors beside DTensors only if they have one element. A group with others steps tensor by tensor.

Muon multiplies whole matrices: each rank gathers one matrix at a time, computes the whole update, and keeps its part.
The update is then bit-identical to that of one process with the same gradients. torch's own product of DTensors rounds
in another order, and Muon amplifies the rounding errors of bfloat16. With fewer rows than ranks, torch's step fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nucleate.layout import is_sharded, laid_out_like, whole_of


def sharded_step(optimizer: Optimizer) -> AbstractContextManager[object]:
    """Return the context in which an optimizer steps DTensors.

    Args:
        optimizer: The user's optimizer.
    """
    if isinstance(optimizer, torch.optim.Muon):
        return _whole_matrices()
    changes = [(group, options) for group in optimizer.param_groups if (options := _options(optimizer, group))]
    return _with_options(optimizer, changes) if changes else nullcontext()


def _options(optimizer: Optimizer, group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a group that must be others during a step."""
    plain = [parameter for parameter in group["params"] if not is_sharded(parameter)]
    if len(plain) == len(group["params"]):
        return {}
    # DTensor takes a plain tensor of one element for a replicated one (`_try_replicate_spec_for_scalar_tensor` in
    # torch/distributed/tensor/_dispatch.py, 2.13). Optimizers see a complex number as two real ones.
    if any(parameter.numel() != 1 or parameter.is_complex() for parameter in plain):
        return {name: False for name in ("foreach", "fused") if name in group and group[name] is not False}
    lacks_fused = isinstance(optimizer, (torch.optim.SGD, torch.optim.Adagrad))
    return {"fused": None} if lacks_fused and group.get("fused") else {}


@contextmanager
def _with_options(optimizer: Optimizer, changes: list[tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[None]:
    """Give groups other options. Afterwards they are as before."""
    before = [(group, {name: group[name] for name in options}) for group, options in changes]
    # A gradient scaler leaves it to a fused optimizer to skip a step (torch/amp/grad_scaler.py, 2.13).
    skips = vars(optimizer).get("_step_supports_amp_scaling")
    for group, options in changes:
        group.update(options)
    if skips:
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if skips:
            optimizer._step_supports_amp_scaling = skips  # type: ignore[attr-defined]
        for group, options in before:
            group.update(options)


@contextmanager
def _whole_matrices() -> Iterator[None]:
    """Let Muon orthogonalize whole matrices. Outside of this context, torch's function is as before."""
    from torch.optim import _muon

    orthogonalize = _muon._zeropower_via_newtonschulz

    def whole(gradient: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return laid_out_like(gradient, orthogonalize(whole_of(gradient), *args, **kwargs))

    _muon._zeropower_via_newtonschulz = whole  # type: ignore[assignment]
    try:
        yield
    finally:
        _muon._zeropower_via_newtonschulz = orthogonalize
