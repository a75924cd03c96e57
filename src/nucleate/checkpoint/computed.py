"""Tensors that are computed of stored ones: a loader treats them as if they stood in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nucleate.checkpoint.stored import StoredTensor
from nucleate.deferred import Given


@dataclass(frozen=True, eq=False)
class ComputedTensor(StoredTensor):
    """A tensor that torch code makes of tensors in a checkpoint, when it is read.

    Attributes:
        given: Makes ranges of the elements.
    """

    given: Given

    @classmethod
    def of(cls, key: str, given: Given) -> ComputedTensor:
        """Return what is computed, under a name for messages."""
        return cls(key, given.dtype, tuple(given.shape), (), given)

    @property
    def is_plain(self) -> bool:
        return False

    def check(self) -> None:
        """Do nothing: the tensors that it is computed of were checked."""

    def check_unchanged(self) -> None:
        self.given.check_unchanged()

    def is_same(self, other: StoredTensor) -> bool:
        return (self.dtype, self.shape, self.describe()) == (other.dtype, other.shape, other.describe())

    def order(self, start: int) -> tuple[int, int]:
        return self.given.order(start)

    def describe(self) -> str:
        return self.given.describe()

    def read(self, start: int, out: Tensor) -> None:
        self.given.read(start, out)
