"""Stand-ins: deferred copies in the place of tensors that must keep their value while a method writes to a module.

A method that fills some tensors of a module usually writes the others as well. While the method runs, stand-ins with
the same attributes and values replace these others. The method draws the same random numbers as without stand-ins, and
its writes to a stand-in do not last. A stand-in takes no memory. The value of a real tensor is copied only if another
value depends on it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from nucleate.deferred.guards.handle import handle_of, is_shared
from nucleate.deferred.impersonation.deepcopy import look
from nucleate.deferred.module_tensors import held_tensors
from nucleate.deferred.record import Record
from nucleate.deferred.tape.steps import Constant, Step, TensorRef
from nucleate.errors import DeferredEditError, name_list


@contextmanager
def stand_ins(model: nn.Module, record: Record, excepted: Collection[Tensor]) -> Iterator[None]:
    """Replace the tensors of a model by stand-ins, and put the tensors back at the end.

    Args:
        model: The model. The parameters, buffers and attributes of its modules are replaced.
        record: The record, which is recording.
        excepted: The tensors that stay in place.
    """
    barren = set[int]()
    for module in model.modules():
        for _, _, tensor in held_tensors(module, barren):
            handle = handle_of(tensor)
            # A stand-in is made and compared without the guard.
            if handle is not None and handle.record.device == record.device and not is_shared(tensor, handle):
                record.adopt_guarded(tensor)
    cast = _Cast(record, {id(tensor) for tensor in excepted})
    try:
        for module in model.modules():
            cast.replace(module)
        yield
        cast.refuse_written()
    finally:
        cast.put_back()
        cast.forget_unread()


class _Cast:
    """The stand-ins of one model.

    Args:
        record: The record, which is recording.
        excepted: Ids of tensors that get no stand-in.
    """

    def __init__(self, record: Record, excepted: set[int]) -> None:
        self._record = record
        self._excepted = excepted
        # By the id of a tensor, the tensor and its stand-in. By the address of a storage, the storage of its stand-ins.
        self._by_tensor: dict[int, tuple[Tensor, Tensor]] = {}
        self._by_storage: dict[int, torch.UntypedStorage] = {}
        self._barren: set[int] = set()
        # Registries or `__dict__`s, with the names and the values that were replaced in them.
        self._places: list[tuple[dict[str, Any], str, Any]] = []
        self._real: list[tuple[Step, Tensor]] = []
        # Tensors that must not be written: the place of each, the tensor, and a number that a write changes.
        self._watched: list[tuple[str, Tensor, int]] = []

    def replace(self, module: nn.Module) -> None:
        """Replace the tensors that a module itself holds."""
        if isinstance(module, torch.jit.ScriptModule):
            return
        for kind, name, tensor in list(held_tensors(module, self._barren)):
            if id(tensor) in self._excepted:
                continue
            stand_in = self._of(tensor)
            if stand_in is not None or kind != "attribute":
                self._watch(f"{type(module).__name__}.{name}", tensor)
            if stand_in is not None:
                registry = {"parameter": module._parameters, "buffer": module._buffers}.get(kind, module.__dict__)
                self._replace(registry, name)  # type: ignore[arg-type]

    def refuse_written(self) -> None:
        """Raise if a tensor that cannot have a stand-in was written.

        Raises:
            DeferredEditError: Such a tensor was written.
        """
        written = [name for name, tensor, mark in self._watched if self._mark(tensor) != mark]
        if written:
            raise DeferredEditError(
                f"a method that initializes other tensors has overwritten {name_list(written)}. Tensors that are "
                "sharded, quantized or sparse, or that are held in other objects as well, cannot be protected from "
                "it. Give every tensor of the module a value before `setup`, and load this one again."
            )

    def put_back(self) -> None:
        """Put all replaced tensors back."""
        for registry, name, value in reversed(self._places):
            registry[name] = value

    def forget_unread(self) -> None:
        """Drop the references to real tensors whose value nothing has read."""
        read = {storage for step in self._record.tape.steps for storage in step.reads}
        for step, whole in self._real:
            if self._record.tape.number(whole) not in read:
                step.args = ()

    def _watch(self, name: str, tensor: Tensor) -> None:
        self._watched.append((name, tensor, self._mark(tensor)))

    def _mark(self, tensor: Tensor) -> int:
        """Return a number that a write to a tensor changes."""
        number = self._record.tape.number(tensor)
        if number is not None:
            return len(self._record.tape.writers(number))
        with torch._C.DisableTorchFunction():
            return 0 if tensor.is_inference() or tensor.is_meta else tensor._version

    def _replace(self, registry: dict[str, Any], name: str) -> None:
        before = registry[name]
        after = self._replaced(before)
        if after is not before:
            self._places.append((registry, name, before))
            registry[name] = after

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._by_tensor[id(value)][1] if id(value) in self._by_tensor else value
        if type(value) in (list, tuple):
            items = [self._replaced(item) for item in value]
            return value if all(map(_is, items, value)) else type(value)(items)
        if type(value) is dict:
            found = {key: self._replaced(item) for key, item in value.items()}
            return value if all(map(_is, found.values(), value.values())) else found
        return value

    def _of(self, tensor: Tensor) -> Tensor | None:
        """Return the stand-in of a tensor, or None if it has to stay."""
        if id(tensor) in self._by_tensor:
            return self._by_tensor[id(tensor)][1]
        number = self._record.tape.number(tensor)
        with torch._C.DisableTorchFunction():
            special = tensor.layout != torch.strided or tensor.is_quantized or is_lazy(tensor)
            special = special or is_traceable_wrapper_subclass(tensor) or (number is None and tensor.is_meta)
        if special or id(tensor) in self._excepted or handle_of(tensor) is not None:
            return None
        stand_in = self._make(tensor, number)
        # A stand-in of a tensor that two collections hold is met again.
        self._excepted.add(id(stand_in))
        self._by_tensor[id(tensor)] = tensor, stand_in
        return stand_in

    def _make(self, tensor: Tensor, number: int | None) -> Tensor:
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
            offset, size, stride = int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride()
            requires_grad = tensor.requires_grad
        if storage._cdata not in self._by_storage:
            self._by_storage[storage._cdata] = self._copied(storage, number)
        with torch.no_grad():
            stand_in = look(self._by_storage[storage._cdata], tensor.dtype, offset, size, stride)
            if tensor.is_conj():
                stand_in = stand_in.conj()
            if tensor.is_neg():
                stand_in = torch._neg_view(stand_in)
        if isinstance(tensor, nn.Parameter):
            stand_in = nn.Parameter(stand_in, requires_grad)
        elif requires_grad:
            stand_in.requires_grad_()
        with suppress(TypeError):  # A class with a layout of its own.
            stand_in.__class__ = type(tensor)
        stand_in.__dict__.update(tensor.__dict__)
        return stand_in

    def _copied(self, storage: torch.UntypedStorage, number: int | None) -> torch.UntypedStorage:
        """Return a storage without memory that has the content of another storage."""
        if number is not None:
            whole = look(storage, torch.uint8, 0, (storage.nbytes(),), (1,))
            with torch.no_grad():
                copied = whole.clone()
            with torch._C.DisableTorchFunction():
                return copied.untyped_storage()
        tape = self._record.tape
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            stands_for = torch.empty(storage.nbytes(), dtype=torch.uint8, device="meta")
            real = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        number = tape.add_storage(stands_for)
        ref = TensorRef(number, torch.uint8, (storage.nbytes(),), (1,), 0, False, False)
        args = (Constant(real), self._record.device)
        step = tape.append(tape.step(_content, args, outputs=(ref,), creates=(number,)))
        self._real.append((step, stands_for))
        with torch._C.DisableTorchFunction():
            return stands_for.untyped_storage()


def _content(memory: Tensor, device: torch.device) -> Tensor:
    # A replay writes to the copy. These writes must not reach the tensor.
    return memory.to(device, copy=True)


def _is(first: object, second: object) -> bool:
    return first is second
