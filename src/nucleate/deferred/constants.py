"""Real tensors that recorded steps read: kept as they were when the step was recorded."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from nucleate.deferred.geometry import is_plain
from nucleate.deferred.tape import Constant, marks

#: Real tensors up to this size are cloned when a deferred operation reads them; larger ones are watched.
CLONE_LIMIT_BYTES = 1 << 20


class Constants:
    """The real tensors that the steps of a recording read and that are too large to clone at once."""

    def __init__(self) -> None:
        self._watched: dict[int, Constant] = {}

    def of(self, tensor: Tensor) -> Constant:
        """Return what the tape keeps of a real tensor."""
        # Memory that torch cannot resize is shared with NumPy, a file or others, whose writes nobody would notice
        # (torch/csrc/utils/tensor_numpy.cpp, 2.13).
        is_watched = is_plain(tensor) and tensor.untyped_storage().resizable()
        is_watched = is_watched and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        if not is_watched or tensor.is_inference() or tensor.numel() * tensor.element_size() <= CLONE_LIMIT_BYTES:
            return Constant(tensor.detach().clone())
        # The tensor itself: below autograd, where this runs, `detach` has a version counter of its own.
        constant = Constant(tensor, marks(tensor))
        self._watched[tensor.untyped_storage()._cdata] = constant
        return constant

    def before_writes(self, written: Iterable[Tensor]) -> None:
        """Before real tensors are written, give the steps that read them a copy of what they saw."""
        if not self._watched:
            return
        for tensor in written:
            constant = self._watched.pop(tensor.untyped_storage()._cdata, None) if not tensor.is_meta else None
            if constant is not None:
                constant.tensor, constant.seen = constant.tensor.detach().clone(), None

    def absorb(self, other: Constants) -> None:
        """Watch what another recording watched."""
        self._watched.update(other._watched)
