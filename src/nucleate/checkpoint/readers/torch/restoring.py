"""Objects of the classes that the user allowed, made from their notes exactly as torch's `weights_only` makes them.

torch's unpickler (torch/_weights_only_unpickler.py, 2.13) makes objects while it reads. Here they are made afterwards,
when somebody asks for them: only then are the tensors in them read. Two differences are deliberate. Objects of allowed
classes may also be dicts, lists and sets with items. And an error of an allowed class is not damage of the file.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nucleate.checkpoint.readers.torch.pickle_notes import Allowed, Global, Maker, Step, Unmade, refuse
from nucleate.checkpoint.readers.torch.tensor_notes import PickledTensor, Refused, StateDict, StorageRef
from nucleate.checkpoint.readers.torch.torch_archive import TorchArchive
from nucleate.checkpoint.readers.torch.torch_pickle import allowed_names
from nucleate.deferred import plain_modes

# Python's own stack allows about 1000 calls, and one level takes up to four.
_MAX_DEPTH = 150


class NotAllowedError(Exception):
    """The error for an object that holds something that the user did not allow.

    Attributes:
        note: The note of the thing that is not allowed.
    """

    def __init__(self, note: Any) -> None:
        super().__init__()
        self.note = note


class Restorer:
    """Makes the objects of one archive. An object that several others hold is made once.

    Args:
        archive: The archive, which holds the tensors.
    """

    def __init__(self, archive: TorchArchive) -> None:
        self._archive = archive
        # By the identity of the notes, which the archive keeps alive.
        self._made: dict[int, Any] = {}
        self._storages: dict[str, Tensor] = {}
        self._left_bytes = archive.file.size_bytes

    def restore(self, value: Any) -> Any:
        """Return the object that a note stands for.

        Raises:
            NotAllowedError: It is, or holds, an object of a class that the user did not allow.
            PickleRefusedError: It holds something that cannot be read, or its class raised an error.
            CheckpointError: A tensor in it is damaged.
        """
        with plain_modes():
            return self._restored(value, 0)

    def _restored(self, value: Any, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            refuse("it is nested too deep")
        maker = _MAKERS.get(type(value))
        if maker is None:
            return value
        if id(value) not in self._made:
            made = maker(self, value, depth)
            # A tuple may hold an object that holds the tuple.
            self._made.setdefault(id(value), made)
        return self._made[id(value)]

    def _keep(self, value: Any, made: Any) -> Any:
        """Note what stands for `value` before its items are made, because they may refer to it."""
        self._made[id(value)] = made
        return made

    # --- containers

    def _list(self, value: list[Any], depth: int) -> Any:
        made: list[Any] = self._keep(value, [])
        made.extend(self._restored(item, depth + 1) for item in value)
        return made

    def _tuple(self, value: tuple[Any, ...], depth: int) -> Any:
        return tuple(self._restored(item, depth + 1) for item in value)

    def _set(self, value: set[Any], depth: int) -> Any:
        made: set[Any] = self._keep(value, set())
        for item in value:
            self._do("a set", made.add, self._restored(item, depth + 1))
        return made

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        made: dict[Any, Any] = self._keep(value, {})
        return self._fill(made, value, depth)

    def _ordered(self, value: StateDict, depth: int) -> Any:
        made: OrderedDict[Any, Any] = self._keep(value, OrderedDict())
        self._fill(made, value, depth)
        vars(made).update(self._restored(value.attributes, depth + 1))
        return made

    def _counter(self, value: Counter[Any], depth: int) -> Any:
        made: Counter[Any] = self._keep(value, Counter())
        return self._fill(made, value, depth)

    def _fill(self, made: Any, value: dict[Any, Any], depth: int) -> Any:
        for key, item in value.items():
            self._do("a dict", made.__setitem__, self._restored(key, depth + 1), self._restored(item, depth + 1))
        return made

    # --- tensors

    def _tensor(self, note: PickledTensor, depth: int) -> Tensor:
        self._archive.chunk(note)  # checks that the record is as long as the pickle says
        begin = note.storage.begin_bytes // note.dtype.itemsize + note.offset
        if note.storage.begin_bytes % note.dtype.itemsize:
            refuse("it holds a tensor that begins in the middle of an element")
        made = torch.empty(0, dtype=note.dtype, device="cpu")
        made.set_(self._storage(note.storage).untyped_storage(), begin, note.shape, note.stride)
        made = made.conj() if note.is_conjugate else made
        made = torch._neg_view(made) if note.is_negative else made
        if note.is_parameter:
            return nn.Parameter(made, note.requires_grad)
        return made.requires_grad_(note.requires_grad)

    def _storage(self, note: StorageRef) -> Tensor:
        """Return all bytes of a storage, so that tensors that share memory share it again."""
        if note.key not in self._storages:
            offset, size_bytes = self._archive.record(note.key)
            self._left_bytes -= size_bytes
            if self._left_bytes < 0:
                refuse("its tensors have more bytes than the file")
            data = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
            if size_bytes:
                self._archive.file.read_into(data.data_ptr(), size_bytes, offset)
            self._storages[note.key] = data
        return self._storages[note.key]

    # --- names and objects

    def _named(self, note: Global, depth: int) -> Any:
        if not isinstance(note, Allowed):
            raise NotAllowedError(note)
        return note.value

    def _known(self, note: Maker, depth: int) -> Any:
        if note.value is None:
            refuse("it refers to a function of torch that makes tensors")
        return note.value

    def _refused(self, note: Refused, depth: int) -> Any:
        refuse(f"it holds {note.what}")

    def _bare_storage(self, note: StorageRef, depth: int) -> Any:
        refuse("it holds a bare storage")

    def _object(self, note: Unmade, depth: int) -> Any:
        if not isinstance(note.function, (Allowed, Maker)):
            raise NotAllowedError(note)
        function = self._restored(note.function, depth + 1)
        args = [self._restored(arg, depth + 1) for arg in note.args]
        keywords = {name: self._restored(arg, depth + 1) for name, arg in note.keywords.items()}
        if note.is_new:
            made = self._do(note.name, lambda: function.__new__(function, *args, **keywords))
        else:
            made = self._do(note.name, lambda: function(*args, **keywords))
        self._keep(note, made)
        for step, value in note.steps:
            self._do(note.name, _STEPS[step], made, self._restored(value, depth + 1))
        return made

    def _do(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        """Call code of an allowed class. Whatever it raises, the file is not damaged."""
        try:
            return function(*args)
        except Exception as error:
            refuse(f"{name} raised {type(error).__name__} when it was made: {str(error)[:200]}")


def _give_state(made: Any, state: Any) -> None:
    if type(made) not in (*allowed_names().values(), OrderedDict):
        raise TypeError(f"{type(made).__module__}.{type(made).__qualname__} is not allowed, but gets a state")
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
        return
    # As in pickle, the state of an object with `__slots__` is a pair.
    slots = None
    if isinstance(state, tuple) and len(state) == 2:
        state, slots = state
    if state:
        made.__dict__.update(state)
    for name, value in (slots or {}).items():
        setattr(made, name, value)


def _set_items(made: Any, items: list[Any]) -> None:
    for place in range(0, len(items), 2):
        made[items[place]] = items[place + 1]


def _append(made: Any, items: list[Any]) -> None:
    # As in pickle: not every object with items has a method for many of them.
    if hasattr(made, "extend"):
        made.extend(items)
        return
    for item in items:
        made.append(item)


def _add(made: Any, items: list[Any]) -> None:
    if isinstance(made, set):
        made.update(items)
        return
    for item in items:
        made.add(item)


_STEPS = {Step.STATE: _give_state, Step.ITEMS: _set_items, Step.APPENDED: _append, Step.ADDED: _add}

_MAKERS: dict[type, Callable[[Restorer, Any, int], Any]] = {
    list: Restorer._list,
    tuple: Restorer._tuple,
    set: Restorer._set,
    dict: Restorer._dict,
    StateDict: Restorer._ordered,
    Counter: Restorer._counter,
    PickledTensor: Restorer._tensor,
    Global: Restorer._named,
    Allowed: Restorer._named,
    Maker: Restorer._known,
    Refused: Restorer._refused,
    StorageRef: Restorer._bare_storage,
    Unmade: Restorer._object,
}
