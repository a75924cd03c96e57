"""Steps: recorded operations and their parts, as plain data."""

from __future__ import annotations

import ctypes
import hashlib
from bisect import bisect_right, insort
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.tape.leaves import map_leaves


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A deferred tensor as a step saw it: a storage of the tape and a geometry on it.

    Attributes:
        storage: The storage's number on the tape.
        dtype: The element type.
        size: The shape.
        stride: The strides, in elements.
        offset: The first element's offset in the storage, in elements.
        conj: Whether the conjugate bit is set.
        neg: Whether the negative bit is set.
    """

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    neg: bool

    @property
    def numel(self) -> int:
        """The number of elements."""
        count = 1
        for length in self.size:
            count *= length
        return count

    def fills(self, size_bytes: int) -> bool:
        """Return whether the elements are exactly the `size_bytes` bytes of the storage, each once."""
        if self.offset != 0 or self.numel * self.dtype.itemsize != size_bytes:
            return False
        expected = 1
        for length, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if stride != expected and length != 1:
                break
            expected *= length
        else:
            return True
        expected = 1
        for stride, length in sorted((s, n) for n, s in zip(self.size, self.stride, strict=True) if n != 1):
            if stride != expected:
                return self.numel == 0
            expected *= length
        return True


@dataclass(slots=True, weakref_slot=True)
class Constant:
    """A real tensor that a step read.

    Attributes:
        tensor: The tensor itself, or a clone where cloning is cheap.
        seen: The tensor's version counter and a sum over its bytes when the step read it. It is None for a clone, and
            for a tensor whose later writes are meant to count.
    """

    tensor: Tensor
    seen: tuple[int, int] | None = None

    def check(self) -> None:
        """Raise an error if the tensor was written to since the step read it."""
        if self.seen is not None and self.seen != marks(self.tensor):
            from nucleate.errors import DeferredEditError

            raise DeferredEditError(
                f"a real tensor of shape {tuple(self.tensor.shape)} that the constructor copied into a deferred "
                "parameter was edited in place after `init_module`. Edit a clone, or edit it inside the context."
            )

    def keep_copy(self) -> None:
        """Keep a copy from now on, because the tensor is about to be written."""
        self.tensor, self.seen = self.tensor.detach().clone(), None

    def value(self) -> Tensor:
        """Return the tensor, after a check that it was not written to since the step read it."""
        self.check()
        return self.tensor.detach()


def marks(tensor: Tensor) -> tuple[int, int]:
    """Return two marks that show writes to a contiguous tensor: its version, and a sum for writes through `.data`."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        words = tensor.detach().view(-1).view(torch.uint8)
        rest = words.numel() % 8
        total = words[: words.numel() - rest].view(torch.int64).sum() + words[words.numel() - rest :].sum()
        return tensor._version, int(total)


@dataclass(slots=True, eq=False)
class Run:
    """A part of one generator's stream, in which the number of draws of every step is known.

    Attributes:
        device: The generator's device type.
        state: The true state at the run's start, or None while it is not known.
        behind: The position and the step before the run's start, if executing the step gives the state there.
        known: Known states inside of the run, by their offsets, in ascending order.
        number: The run's number, in the order in which runs begin.
    """

    device: str
    state: Tensor | None
    behind: tuple[Position, Step] | None = None
    known: list[tuple[int, Tensor]] = field(default_factory=list)
    number: int = field(default_factory=count().__next__)

    def nearest(self, offset: int) -> tuple[int, Tensor]:
        """Return the offset of the last known state at or before `offset`, and that state."""
        assert self.state is not None
        place = bisect_right(self.known, offset, key=_offset)
        return self.known[place - 1] if place else (0, self.state)

    def remember(self, offset: int, state: Tensor) -> None:
        """Add a known state."""
        insort(self.known, (offset, state), key=_offset)

    def forget(self, offset: int) -> None:
        """Remove the known state at `offset`."""
        del self.known[bisect_right(self.known, offset, key=_offset) - 1]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the stream of one generator.

    Attributes:
        run: The run that the position is in.
        offset: The distance from the run's start, in 32-bit draws on the CPU and in the device's own unit elsewhere.
    """

    run: Run
    offset: int

    def describe(self) -> tuple[str, int, int]:
        """Return a fingerprint of the run's start, the index of the step before that start, and the offset.

        The fingerprint is empty if there is such a step; else the index is -1. Except for the step's index, the result
        is equal on all ranks at the same place.
        """
        if self.run.behind is not None:
            return "", self.run.behind[1].index, self.offset
        assert self.run.state is not None
        content = ctypes.string_at(self.run.state.data_ptr(), self.run.state.numel())
        return hashlib.blake2b(content, digest_size=8).hexdigest(), -1, self.offset


@dataclass(slots=True, eq=False)
class Step:
    """One recorded operation.

    Attributes:
        index: The step's place on the tape.
        func: The aten overload, or a Python function that is replayed whole (an opaque step).
        args: Positional arguments, with `TensorRef` and `Constant` for tensors.
        kwargs: Keyword arguments, likewise.
        outputs: One entry for each tensor that the operation returned.
        reads: The storages whose content it needs.
        written: The tensors that it changes in place.
        creates: The storages that it makes.
        overwrites: The storages of `written` whose whole content it replaces without reading it.
        default_dtype: torch's default dtype at that time.
        position: The position of a random step in the random program.
        uninitialized: Whether the created memory is uninitialized (`empty`).
    """

    index: int
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorRef, ...]
    reads: tuple[int, ...]
    written: tuple[TensorRef, ...]
    creates: tuple[int, ...]
    overwrites: tuple[int, ...]
    default_dtype: torch.dtype
    position: Position | None = None
    uninitialized: bool = False

    @property
    def writes(self) -> tuple[int, ...]:
        """The existing storages that the step changes."""
        return tuple(dict.fromkeys(ref.storage for ref in self.written))

    def renumber(self, first_step: int, first_storage: int) -> None:
        """Add `first_step` to the step's index, and `first_storage` to the numbers of its storages."""

        def moved(leaf: Any) -> Any:
            return replace(leaf, storage=leaf.storage + first_storage) if isinstance(leaf, TensorRef) else leaf

        self.index += first_step
        self.args, self.kwargs = map_leaves(self.args, moved), map_leaves(self.kwargs, moved)
        self.outputs, self.written = tuple(map(moved, self.outputs)), tuple(map(moved, self.written))
        self.reads = tuple(number + first_storage for number in self.reads)
        self.creates = tuple(number + first_storage for number in self.creates)
        self.overwrites = tuple(number + first_storage for number in self.overwrites)

    def __str__(self) -> str:
        return f"{self.index:5d} {self.func} reads={self.reads} writes={self.writes} creates={self.creates}"


def _offset(known: tuple[int, Tensor]) -> int:
    return known[0]
