"""Tensors that are computed from stored tensors. A loader treats them like tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nucleate.checkpoint.stored.data_file import Bytes
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import ElementSource
from nucleate.deferred.replay import Derived, TensorView, derived_source


@dataclass(frozen=True, eq=False)
class ComputedTensor(StoredTensor, Derived):
    """A tensor that torch code computes from tensors of a checkpoint while it is read.

    Attributes:
        given: The element source that computes ranges of the tensor.
        made_of: The tensors of the checkpoint, as far as they are known.
    """

    given: ElementSource
    made_of: tuple[StoredTensor, ...] = ()

    @classmethod
    def of(cls, key: str, given: ElementSource, made_of: tuple[StoredTensor, ...] = ()) -> ComputedTensor:
        """Return the tensor of an element source, with the key `key` for messages."""
        return cls(key, given.dtype, tuple(given.shape), (), given, made_of)

    @property
    def identity(self) -> tuple[Any, ...]:
        return (self.dtype, self.shape, self.describe())

    @property
    def files(self) -> tuple[Bytes, ...]:
        return tuple(file for stored in self.made_of for file in stored.files)

    @property
    def origin(self) -> str:
        return ", ".join(stored.key for stored in self.made_of)

    @property
    def is_plain(self) -> bool:
        return False

    def check(self) -> None:
        """Do nothing, because the tensors that it is computed from were checked."""

    def locate(self, begin: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> None:
        """Find the elements of all tensors that it is computed from."""
        for stored in self.made_of:
            stored.locate()

    def check_unchanged(self) -> None:
        self.given.check_unchanged()

    def order(self, start: int) -> tuple[int, int]:
        return self.given.order(start)

    def describe(self) -> str:
        return self.given.describe()

    def source(self) -> TensorView | None:
        return derived_source(self.given)

    def read(self, start: int, out: Tensor) -> None:
        self.given.read(start, out)
