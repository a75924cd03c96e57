"""The backward of a loss that a precision scales: only `runtime.backward` scales it, so other ways are refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nucleate.errors import UsageError

# The number of open `backward_allowed` contexts. A plain number and not a context variable: on accelerators the hooks
# run in autograd's own threads, which do not see the caller's context.
_backward_allowed = 0


@contextmanager
def backward_allowed() -> Iterator[None]:
    """Surround a backward pass of a scaled loss. Outside of this context, backward through a scaling wrapper fails."""
    global _backward_allowed
    _backward_allowed += 1
    try:
        yield
    finally:
        _backward_allowed -= 1


def refuse_plain_backward(output: Any) -> None:
    """Let a backward from the tensors of an output fail outside of `backward_allowed`.

    Args:
        output: The output of a forward: a tensor, or a collection with tensors.
    """
    from lightning_utilities.core.apply_func import apply_to_collection

    apply_to_collection(output, Tensor, _guard)


def _guard(tensor: Tensor) -> None:
    # A leaf, such as a parameter that forward returns, would keep the hook forever.
    if tensor.requires_grad and not tensor.is_leaf:
        tensor.register_hook(_check_backward)


def _check_backward(_: Tensor) -> None:
    if not _backward_allowed:
        raise UsageError(
            "loss.backward() was called, but the precision scales gradients and this loss is not scaled. Call "
            "runtime.backward(loss). No gradient was changed."
        )
