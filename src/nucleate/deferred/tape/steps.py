"""Steps: recorded operations and what they are made of, as plain data."""

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
        stride: In elements.
        offset: Of the first element, in elements.
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
        """How many elements there are."""
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
        seen: Its version counter and a sum over its bytes when it was read, or None for a clone, and where later writes
            are meant to be seen.
    """

    tensor: Tensor
    seen: tuple[int, int] | None = None

    def check(self) -> None:
        """Refuse a tensor that was written to since it was read."""
        if self.seen is not None and self.seen != marks(self.tensor):
            from nucleate.errors import DeferredEditError

            raise DeferredEditError(
                f"a real tensor of shape {tuple(self.tensor.shape)} that the constructor copied into a deferred "
                "parameter was edited in place after `init_module`. Edit a clone of it, or edit it inside the context."
            )

    def keep_copy(self) -> None:
        """Keep a copy from here on, because the tensor is about to be written."""
        self.tensor, self.seen = self.tensor.detach().clone(), None

    def value(self) -> Tensor:
        """Return the tensor, refusing one that was written to since it was read."""
        self.check()
        return self.tensor.detach()


def marks(tensor: Tensor) -> tuple[int, int]:
    """Return what tells that a contiguous tensor was written: its version, and for writes through `.data` a sum."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        words = tensor.detach().view(-1).view(torch.uint8)
        rest = words.numel() % 8
        total = words[: words.numel() - rest].view(torch.int64).sum() + words[words.numel() - rest :].sum()
        return tensor._version, int(total)


@dataclass(slots=True, eq=False)
class Run:
    """A stretch of one generator's stream in which every step is known to draw so and so much.

    Attributes:
        device: The generator's device type.
        state: The true state at its start, or None while it is not known.
        behind: The position and the step that lead to its start, where the state is found by executing the step.
        known: States on the way, by their offsets, in ascending order.
        number: Runs are numbered as they begin.
    """

    device: str
    state: Tensor | None
    behind: tuple[Position, Step] | None = None
    known: list[tuple[int, Tensor]] = field(default_factory=list)
    number: int = field(default_factory=count().__next__)

    def nearest(self, offset: int) -> tuple[int, Tensor]:
        """Return the last known state that does not lie behind `offset`, and where it is."""
        assert self.state is not None
        place = bisect_right(self.known, offset, key=_offset)
        return self.known[place - 1] if place else (0, self.state)

    def remember(self, offset: int, state: Tensor) -> None:
        """Add a known state."""
        insort(self.known, (offset, state), key=_offset)

    def forget(self, offset: int) -> None:
        """Take the known state at `offset` away."""
        del self.known[bisect_right(self.known, offset, key=_offset) - 1]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the stream of one generator.

    Attributes:
        run: The run it is in.
        offset: How far from the run's start: in 32-bit draws on the CPU, elsewhere as the device counts.
    """

    run: Run
    offset: int

    def describe(self) -> tuple[str, int, int]:
        """Return the start of its run, as a fingerprint or as the step behind which it lies (else -1), and the offset.

        Equal on all ranks that stand at the same place, but for the step's number.
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
        index: Its place on the tape.
        func: The aten overload, or a Python function that is replayed whole (an opaque step).
        args: Positional arguments, with `TensorRef` and `Constant` for tensors.
        kwargs: Keyword arguments, likewise.
        outputs: One entry per tensor it returned.
        reads: Storages whose content it needs.
        written: The tensors it changes in place.
        creates: Storages that it makes.
        overwrites: Storages of `written` whose old content it replaces entirely without looking at it.
        default_dtype: torch's default dtype at that time.
        position: For a random step, where in the random program it stands.
        uninitialized: Whether what it creates is memory with nothing in it (`empty`).
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
        """The storages that existed before and that it changes."""
        return tuple(dict.fromkeys(ref.storage for ref in self.written))

    def renumber(self, first_step: int, first_storage: int) -> None:
        """Count steps and storages from other numbers on."""

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
