"""Real tensors that recorded steps read: kept as they were when the step was recorded."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor

from nucleate.deferred.elements.tensor_source import TensorSource
from nucleate.deferred.recording.meta_shapes import is_plain
from nucleate.deferred.tape.steps import Constant, marks

#: Real tensors up to this size are cloned when a deferred operation reads them; larger ones are watched.
CLONE_LIMIT_BYTES = 1 << 20


class Constants:
    """The real tensors that the steps of a recording read and that are not cloned at once."""

    def __init__(self) -> None:
        # By the storage of the tensor. The references are weak: a constant that the tape drops need not be watched.
        self._watched: dict[int, list[weakref.ref[Constant | TensorSource]]] = {}

    def of(self, tensor: Tensor) -> Constant:
        """Return the constant that the tape keeps for a real tensor."""
        # Memory that torch cannot resize is shared with NumPy, a file or others. Nobody would notice their writes
        # (torch/csrc/utils/tensor_numpy.cpp, 2.13).
        is_watched = is_plain(tensor) and tensor.untyped_storage().resizable()
        is_watched = is_watched and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())
        if not is_watched or tensor.is_inference() or tensor.numel() * tensor.element_size() <= CLONE_LIMIT_BYTES:
            return Constant(tensor.detach().clone())
        # Keep the tensor itself. This runs below autograd, where `detach` returns a tensor with a new version counter.
        constant = Constant(tensor, marks(tensor))
        self._watch(tensor, constant)
        return constant

    def given(self, tensor: Tensor) -> TensorSource:
        """Return an element source that refers to a real tensor, such as one of a state dict."""
        given = TensorSource(tensor)
        self._watch(tensor, given)
        return given

    def _watch(self, tensor: Tensor, kept: Constant | TensorSource) -> None:
        self._watched.setdefault(tensor.untyped_storage()._cdata, []).append(weakref.ref(kept))

    def before_writes(self, written: Iterable[Tensor]) -> None:
        """Give the steps that read these real tensors a copy of the old values, before the tensors are written."""
        if not self._watched:
            return
        for tensor in written:
            for kept in self._watched.pop(tensor.untyped_storage()._cdata, ()) if not tensor.is_meta else ():
                if (alive := kept()) is not None:
                    alive.keep_copy()

    def absorb(self, other: Constants) -> None:
        """Watch the tensors that another recording watched."""
        for storage, kept in other._watched.items():
            self._watched.setdefault(storage, []).extend(kept)
