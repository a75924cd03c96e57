"""Notes that stand for tensors, storages and state dicts in a pickle of torch."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class StorageRef:
    """A storage that a pickle refers to.

    Attributes:
        key: Its name in the archive.
        dtype: The dtype of its elements.
        size_bytes: Its size.
        begin_bytes: The place in the record where it begins, for the views of older files.
    """

    key: str
    dtype: torch.dtype
    size_bytes: int
    begin_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class PickledTensor:
    """A tensor that a pickle refers to.

    Attributes:
        storage: The storage that holds its elements.
        dtype: The dtype of its elements.
        offset: The place of its first element in the storage, in elements.
        shape: Its shape.
        stride: Its strides, in elements.
        is_conjugate: Whether its numbers are the conjugates of the stored numbers.
        is_negative: Whether its numbers are the negatives of the stored numbers.
        requires_grad: Whether it required gradients when it was saved.
        is_parameter: Whether it was saved as a parameter.
    """

    storage: StorageRef
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_conjugate: bool = False
    is_negative: bool = False
    requires_grad: bool = False
    is_parameter: bool = False

    def build(self, state: Any) -> None:
        """Ignore the attributes of the tensor, which have no place in a checkpoint."""


class Refused:
    """A tensor of a kind that cannot be read.

    Attributes:
        what: The kind of the tensor, for a message.
    """

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def build(self, state: Any) -> None:
        """Ignore the state."""


class StateDict(OrderedDict[Any, Any]):
    """An ordered dict that `Module.state_dict` may have made.

    Attributes:
        is_of_module: Whether `Module.state_dict` made the dict.
        versions: The version of each module's format, by the module's name, as far as the file contains it.
        attributes: The attributes of the dict.
    """

    is_of_module = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.versions: dict[str, int] = {}
        self.attributes: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        """Take the attributes of the dict. Only modules leave an attribute called `_metadata`."""
        self.attributes = state if isinstance(state, dict) else {}
        self.is_of_module = isinstance(state, dict) and "_metadata" in state
        found = state["_metadata"] if self.is_of_module else None
        for name, one in found.items() if isinstance(found, dict) else ():
            version = one.get("version") if isinstance(one, dict) else None
            if type(name) is str and type(version) is int:
                self.versions[name] = version


def storage_of(persistent_id: Any) -> StorageRef:
    """Return the storage that a persistent id names.

    Raises:
        ValueError: The persistent id does not name a storage.
    """
    if type(persistent_id) is not tuple or persistent_id[0] not in ("storage", b"storage"):
        raise ValueError("it asks for something that is not a storage")
    dtype, key, numel = persistent_id[1], persistent_id[2], persistent_id[4]
    if type(key) is int:
        # litgpt's `incremental_save` writes numbers; torch puts them into the name of the member, as text.
        key = str(key)
    if not isinstance(dtype, torch.dtype) or type(key) is not str or type(numel) is not int or not 0 <= numel < 1 << 60:
        raise ValueError("it asks for a storage without a name, a dtype or a size")
    view = persistent_id[5] if len(persistent_id) > 5 else None
    if view is None:
        return StorageRef(key, dtype, numel * dtype.itemsize)
    _, begin, length = view
    begin, length = sizes((begin, length))
    if begin + length > numel:
        raise ValueError("a view of a storage reaches beyond the storage")
    return StorageRef(key, dtype, length * dtype.itemsize, begin * dtype.itemsize)


def sizes(numbers: Any) -> tuple[int, ...]:
    """Return numbers from a pickle as a tuple.

    Raises:
        ValueError: They are not sizes.
    """
    if not isinstance(numbers, (tuple, list)) or len(numbers) > 64:
        raise ValueError("a tensor has no shape or strides")
    # A loop, because a large index has millions of sizes. The shift leaves 0 of the numbers from 0 to 2**60 - 1 only.
    for number in numbers:
        if type(number) is not int or number >> 60:
            raise ValueError("a tensor has a shape, strides or an offset that are not sizes")
    return tuple(numbers)
