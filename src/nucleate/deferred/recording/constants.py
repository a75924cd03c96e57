"""Real tensors that recorded steps read: kept as they were when the step was recorded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

from nucleate.deferred.elements.real_tensor import TensorGiven
from nucleate.deferred.recording.meta_shapes import is_plain
from nucleate.deferred.tape.steps import Constant, marks

#: Real tensors up to this size are cloned when a deferred operation reads them; larger ones are watched.
CLONE_LIMIT_BYTES = 1 << 20


class Constants:
    """The real tensors that the steps of a recording read and that are not cloned at once."""

    def __init__(self) -> None:
        # By the storage that they lie on; weakly, since what the tape lets go need not be watched.
        self._watched: dict[int, list[weakref.ref[Constant | TensorGiven]]] = {}

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
        self._watch(tensor, constant)
        return constant

    def given(self, tensor: Tensor) -> TensorGiven:
        """Return the elements of a real tensor by reference, as a state dict gives them."""
        given = TensorGiven(tensor)
        self._watch(tensor, given)
        return given

    def _watch(self, tensor: Tensor, kept: Constant | TensorGiven) -> None:
        self._watched.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(kept))

    def before_writes(self, written: Iterable[Tensor]) -> None:
        """Before real tensors are written, give the steps that read them a copy of what they saw."""
        if not self._watched:
            return
        for tensor in written:
            for kept in self._watched.pop(tensor.untyped_storage()._cdata, ()) if not tensor.is_meta else ():
                if (alive := kept()) is not None:
                    alive.keep_copy()

    def absorb(self, other: Constants) -> None:
        """Watch what another recording watched."""
        for storage, kept in other._watched.items():
            self._watched.setdefault(storage, []).extend(kept)
