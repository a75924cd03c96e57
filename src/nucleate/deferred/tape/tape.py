"""The tape: the operations that made and wrote each storage, as plain data.

Deferred tensors are meta tensors, and a *storage* identifies a value. The tape keeps every storage of the constructor
alive, so that its address is never reused. It numbers the storages and lists the steps that read, wrote and created
them. Views, `detach`, `.data`, `Parameter(...)` and ties need no step: the geometry of the final tensor is enough.
`recording/` writes the tape, and `replay/` runs it again.
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

from nucleate.deferred.elements.element_source import ElementSource, fill_from
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
        #: Whether some step reads an element source, such as a file.
        self.takes_given = False
        # The index of the last step that read a storage, by the storage's number.
        self._last_reads: dict[int, int] = {}
        #: The writers of storages that the constructor left without a value, by the storages' numbers; for reports.
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
        """Forget a tensor and all tensors that share its storage."""
        number = self.number(tensor)
        if number is not None:
            address = self._storages[number]._cdata
            del self._numbers[address]
            _tapes.pop(address, None)

    def storage(self, number: int) -> torch.UntypedStorage:
        """Return a storage by its number; it has no memory."""
        return self._storages[number]

    def addresses(self) -> list[int]:
        """Return the addresses that identify the storages on any tape, in the order of the storages' numbers."""
        return [storage._cdata for storage in self._storages]

    def is_alive(self, storage: int) -> bool:
        """Return whether a tensor on the storage exists."""
        # One use is that of the tape itself.
        return bool(torch._C._storage_Use_Count(self._storages[storage]._cdata) > 1)

    def size_bytes(self, storage: int) -> int:
        """Return the present size of the storage in bytes."""
        return self._storages[storage].nbytes()

    def step(  # noqa: PLR0913 - one call describes an operation completely
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
        """Return the step of an operation that is recorded now, for `append`; see `Step` for the arguments."""
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
        """Append a step that replaces all elements of a tensor without reading them."""
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
        self.takes_given = self.takes_given or step.func is fill_from
        for storage in step.reads:
            self._last_reads[storage] = step.index
        for storage in {*step.writes, *step.creates}:
            self._writers[storage].append(step.index)
        return step

    def givens(self, steps: Iterable[Step]) -> Iterator[ElementSource]:
        """Yield the element sources that steps read."""
        for step in steps:
            if step.func is fill_from and step.args:
                yield step.args[1]

    def forget_given(self, storage: int) -> None:
        """Release the element source that wrote a storage last, unless a step has read the storage since then."""
        last = self._writers[storage][-1] if self._writers[storage] else -1
        if last >= 0 and self.steps[last].func is fill_from and self._last_reads.get(storage, -1) < last:
            # The step stays among the writers, because their number shows edits that were not recorded.
            self.steps[last].args = ()

    def drop(self, step: Step) -> None:
        """Drop a step that only repeats the present content of the storages that it writes."""
        for storage in step.writes:
            self._writers[storage].remove(step.index)
        step.args, step.outputs = (), ()

    def absorb(self, other: Tape) -> None:
        """Append another tape, which must not be used any more. Its steps and storages get new numbers.

        Until now, neither tape has read or written storages of the other. So all steps of one may follow all steps of
        the other.
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
        """Remember weakly the real storage that replaced a storage of the tape."""
        self._made[storage] = StorageWeakRef(real)

    def made(self, storage: int) -> torch.UntypedStorage | None:
        """Return the real storage that replaced a storage of the tape, or None if it is not used any more."""
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
        """Return a fingerprint of some steps, equal on ranks that recorded the same steps, whatever else they recorded.

        Args:
            steps: The steps. The steps that their generators' states depend on are included.
            numbers: A dict that gets a number for each storage of the steps, in the order of use.
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
            # The repr of a Python function contains its address, which differs between processes.
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
    # Bypass the answers of subclasses: guarded tensors say that they are not meta, and lazy ones raise.
    with torch._C.DisableTorchFunction():
        if not tensor.is_meta or tensor.layout != torch.strided:
            return None
        try:
            address: int = tensor.untyped_storage()._cdata
        except NotImplementedError:
            return None  # Inside `vmap` and the like; the tensors that they pass on to dispatch have storages.
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
        if isinstance(leaf, ElementSource):
            return ("given", leaf.describe())
        if isinstance(leaf, Constant):
            return ("constant", leaf.tensor.dtype, tuple(leaf.tensor.shape), _content(leaf.tensor))
        if isinstance(leaf, torch.device):
            # Each rank has its own device of a kind, and makes the same values there.
            return leaf.type
        return type(leaf) if isinstance(leaf, torch.Generator) else leaf

    return map_leaves(value, describe)
