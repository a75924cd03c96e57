"""The tape: which operations made and wrote which storages, as plain data.

Deferred tensors are meta tensors, and what identifies a value is its *storage*. The tape keeps every storage
that the constructor made alive (so that its address is never reused), numbers it, and lists the steps that
read, wrote and created it. Views, `detach`, `.data`, `Parameter(...)` and ties need no step: the geometry of
the tensor that survives says all. `recording/` writes the tape, `replay/` runs it again.
"""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from nucleate.deferred.elements.source import Given, take
from nucleate.deferred.tape.leaves import map_leaves
from nucleate.deferred.tape.steps import Constant, Position, Step, TensorRef

# The tapes, by the addresses of their storages. Process-wide: a tensor may come from any construction.
_tapes: weakref.WeakValueDictionary[int, Tape] = weakref.WeakValueDictionary()


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
        address = _address(tensor)
        return None if address is None else self._numbers.get(address)

    def add_storage(self, tensor: Tensor) -> int:
        """Number the storage of a new meta tensor."""
        storage = tensor.untyped_storage()
        number = len(self._storages)
        self._numbers[storage._cdata] = number
        _tapes[storage._cdata] = self
        self._storages.append(storage)
        self._writers.append([])
        return number

    def forget(self, tensor: Tensor) -> None:
        """Do not know a tensor any more, nor those that share its storage."""
        number = self.number(tensor)
        if number is not None:
            address = self._storages[number]._cdata
            del self._numbers[address]
            _tapes.pop(address, None)

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

    def step(  # noqa: PLR0913 - one call says all there is to say of an operation
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        outputs: tuple[TensorRef, ...] = (),
        reads: tuple[int, ...] = (),
        written: tuple[TensorRef, ...] = (),
        creates: tuple[int, ...] = (),
        overwrites: tuple[int, ...] = (),
        position: Position | None = None,
        uninitialized: bool = False,
    ) -> Step:
        """Return the step of an operation that is done now, to be appended; see `Step` for the arguments."""
        return Step(
            index=len(self.steps),
            func=func,
            args=args,
            kwargs={} if kwargs is None else kwargs,
            outputs=outputs,
            reads=reads,
            written=written,
            creates=creates,
            overwrites=overwrites,
            default_dtype=torch.get_default_dtype(),
            position=position,
            uninitialized=uninitialized,
        )

    def overwrite(
        self,
        ref: TensorRef,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        *,
        outputs: tuple[TensorRef, ...] = (),
        position: Position | None = None,
    ) -> Step:
        """Append a step that gives all elements of a tensor other values and does not look at the old ones."""
        storage = (ref.storage,)
        is_full = ref.fills(self.size_bytes(ref.storage))
        step = self.step(
            func,
            args,
            kwargs,
            outputs=outputs,
            # A write to a part keeps the rest.
            reads=() if is_full else storage,
            written=(ref,),
            overwrites=storage if is_full else (),
            position=position,
        )
        return self.append(step)

    def append(self, step: Step) -> Step:
        """Append the step that was made last, and return it."""
        assert step.index == len(self.steps), "another step was appended meanwhile"
        self.steps.append(step)
        self.takes_given = self.takes_given or step.func is take
        for storage in step.reads:
            self._last_reads[storage] = step.index
        for storage in {*step.writes, *step.creates}:
            self._writers[storage].append(step.index)
        return step

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
        _tapes.update(dict.fromkeys(other._numbers, self))
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


def tape_of(tensor: Tensor) -> Tape | None:
    """Return the tape that knows the storage of a tensor, or None."""
    address = _address(tensor)
    return None if address is None else _tapes.get(address)


def _address(tensor: Tensor) -> int | None:
    """Return the address of a meta tensor's storage, or None for any other tensor."""
    # Subclasses may answer for themselves (guarded ones say they are not meta, lazy ones raise): look behind them.
    with torch._C.DisableTorchFunction():
        if not tensor.is_meta or tensor.layout != torch.strided:
            return None
        try:
            address: int = tensor.untyped_storage()._cdata
        except NotImplementedError:
            return None  # Inside `vmap` and the like; what they hand on to dispatch has a storage.
    return address


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
