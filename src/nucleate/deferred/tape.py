"""The tape: which operations made and wrote which storages, as plain data.

Deferred tensors are meta tensors, and what identifies a value is its *storage*. The tape keeps every storage
that the constructor made alive (so that its address is never reused), numbers it, and lists the steps that
read, wrote and created it. Views, `detach`, `.data`, `Parameter(...)` and ties need no step: the geometry of
the tensor that survives says all. Recording is `record.py`'s job, running it again is `replay.py`'s.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nucleate.deferred.given import Given, take

if TYPE_CHECKING:
    from nucleate.deferred.random_program import Position


_NO_TENSORS = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout))


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


class Tape:
    """The steps of one deferred construction and the storages they work on."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._numbers: dict[int, int] = {}
        self._storages: list[torch.UntypedStorage] = []
        self._writers: list[list[int]] = []
        self._made: dict[int, StorageWeakRef] = {}
        #: Whether some step takes its values from outside of the tape, such as from a file.
        self.takes_given = False
        # The last step that read a storage, by its number.
        self._last_reads: dict[int, int] = {}
        #: Who wrote storages that the constructor left without a value, by number; for reports.
        self.writer_names: dict[int, str] = {}

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of the tensor's storage, or None if the tape does not know it."""
        # Subclasses may answer for themselves (guarded ones say they are not meta, lazy ones raise): look behind them.
        with torch._C.DisableTorchFunction():
            if not tensor.is_meta or tensor.layout != torch.strided:
                return None
            try:
                return self._numbers.get(tensor.untyped_storage()._cdata)
            except NotImplementedError:
                return None  # Inside `vmap` and the like; what they hand on to dispatch has a storage.

    def add_storage(self, tensor: Tensor) -> int:
        """Number the storage of a new meta tensor."""
        storage = tensor.untyped_storage()
        number = len(self._storages)
        self._numbers[storage._cdata] = number
        self._storages.append(storage)
        self._writers.append([])
        return number

    def forget(self, tensor: Tensor) -> None:
        """Do not know a tensor any more, nor those that share its storage."""
        number = self.number(tensor)
        if number is not None:
            del self._numbers[self._storages[number]._cdata]

    def storage(self, number: int) -> torch.UntypedStorage:
        """Return a storage by its number; it has no memory."""
        return self._storages[number]

    def addresses(self) -> list[int]:
        """Return what tells each storage also on another tape, in the order of their numbers."""
        return [storage._cdata for storage in self._storages]

    def is_alive(self, storage: int) -> bool:
        """Return whether a tensor on the storage exists."""
        # One use is the tape's own.
        return bool(torch._C._storage_Use_Count(self._storages[storage]._cdata) > 1)

    def size_bytes(self, storage: int) -> int:
        """Return how large the storage is now, in bytes."""
        return self._storages[storage].nbytes()

    def add_step(self, step: Step) -> None:
        """Append a step."""
        self.steps.append(step)
        self.takes_given = self.takes_given or step.func is take
        for storage in step.reads:
            self._last_reads[storage] = step.index
        for storage in {*step.writes, *step.creates}:
            self._writers[storage].append(step.index)

    def givens(self, steps: Iterable[Step]) -> Iterator[Given]:
        """Yield what steps take from outside of the tape."""
        for step in steps:
            if step.func is take and step.args:
                yield step.args[1]

    def forget_given(self, storage: int) -> None:
        """Let go of what a storage was given last, because it is going to be overwritten and nothing has read it."""
        last = self._writers[storage][-1] if self._writers[storage] else -1
        if last >= 0 and self.steps[last].func is take and self._last_reads.get(storage, -1) < last:
            # It stays among the writers: their number tells of edits that were not recorded.
            self.steps[last].args = ()

    def drop(self, step: Step) -> None:
        """Take a step off the tape that only says what a storage's content is anyway."""
        for storage in step.writes:
            self._writers[storage].remove(step.index)
        step.args, step.outputs = (), ()

    def absorb(self, other: Tape) -> None:
        """Append another tape, which must not be used any more: its steps and storages get new numbers.

        Until now neither tape has read or written what is on the other, so that all of one may follow all of the
        other.
        """
        first_step, first_storage = len(self.steps), len(self._storages)
        for step in other.steps:
            step.renumber(first_step, first_storage)
        self.steps.extend(other.steps)
        self.takes_given = self.takes_given or other.takes_given
        self._last_reads.update({n + first_storage: index + first_step for n, index in other._last_reads.items()})
        self._storages.extend(other._storages)
        self._numbers.update({key: number + first_storage for key, number in other._numbers.items()})
        self._made.update({number + first_storage: made for number, made in other._made.items()})
        self.writer_names.update({number + first_storage: name for number, name in other.writer_names.items()})
        self._writers.extend([index + first_step for index in writers] for writers in other._writers)

    def keep_made(self, storage: int, real: torch.UntypedStorage) -> None:
        """Remember, weakly, the real storage that took the place of one of these."""
        self._made[storage] = StorageWeakRef(real)

    def made(self, storage: int) -> torch.UntypedStorage | None:
        """Return the real storage that took the place of one, if it is still used."""
        weak = self._made.get(storage)
        return None if weak is None else torch.UntypedStorage._new_with_weak_ptr(weak.cdata)

    def writers(self, storage: int) -> list[int]:
        """Return the indices of the steps that created or wrote the storage, ascending."""
        return self._writers[storage]

    def ref(self, tensor: Tensor) -> TensorRef:
        """Describe a deferred tensor by storage and geometry."""
        number = self.number(tensor)
        assert number is not None, "not a deferred tensor of this tape"
        with torch._C.DisableTorchFunction():
            # `size()`, because a lazy parameter overrides `shape`.
            size, stride, offset = tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset())
            return TensorRef(number, tensor.dtype, size, stride, offset, tensor.is_conj(), tensor.is_neg())

    def digest(self, steps: Iterable[Step], numbers: dict[int, int]) -> str:
        """Return a fingerprint of some steps that is equal on ranks that recorded the same, whatever else they did.

        Args:
            steps: The steps; those that the generator's states depend on count as well.
            numbers: Filled with a number for each of their storages, in the order in which they are used.
        """
        included = {step.index: step for step in steps}
        waiting = list(included.values())
        while waiting:
            position = waiting.pop().position
            before = -1 if position is None else position.describe()[1]
            if before >= 0 and before not in included:
                included[before] = self.steps[before]
                waiting.append(self.steps[before])
        digest = hashlib.blake2b(digest_size=16)
        places: dict[int, int] = {-1: -1}
        for index in sorted(included):
            step = included[index]
            places[index] = len(places)
            start, before, offset = ("", -1, 0) if step.position is None else step.position.describe()
            # A Python function's repr carries its address, which differs by process.
            func = str(step.func) if isinstance(step.func, torch._ops.OpOverload) else step.func.__qualname__
            values = _plain((step.args, step.kwargs, step.outputs), numbers)
            digest.update(repr((func, values, start, places[before], offset)).encode())
        return digest.hexdigest()


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in the arguments or results of an aten operation, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    # Several times for each operation, so the classes that most arguments have are told apart at once.
    kind = type(value)
    if kind in _NO_TENSORS:
        return
    if kind is tuple or kind is list:
        for item in value:
            if type(item) not in _NO_TENSORS:
                _collect(item, found)
    elif kind is dict:
        for item in value.values():
            if type(item) not in _NO_TENSORS:
                _collect(item, found)
    elif isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _collect(item, found)


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """Rebuild lists, tuples and dicts with every leaf passed through `change`."""
    kind = type(value)
    if kind in _NO_TENSORS:
        return change(value)
    if isinstance(value, (list, tuple)):
        items = [map_leaves(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_leaves(item, change) for key, item in value.items()}
    return change(value)


def _content(tensor: Tensor) -> str:
    with torch._C.DisableTorchFunction():
        if tensor.layout != torch.strided or tensor.is_quantized:
            return ""
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        data = ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size())
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _plain(value: Any, numbers: dict[int, int]) -> Any:
    def describe(leaf: Any) -> Any:
        if isinstance(leaf, TensorRef):
            return replace(leaf, storage=numbers.setdefault(leaf.storage, len(numbers)))
        if isinstance(leaf, Given):
            return ("given", leaf.describe())
        if isinstance(leaf, Constant):
            return ("constant", leaf.tensor.dtype, tuple(leaf.tensor.shape), _content(leaf.tensor))
        if isinstance(leaf, torch.device):
            # Each rank has its own device of a kind, and makes the same values there.
            return leaf.type
        return type(leaf) if isinstance(leaf, torch.Generator) else leaf

    return map_leaves(value, describe)
