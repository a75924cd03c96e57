"""The plan of a materialization: the deferred tensors of a model and the origin of each value, as printable data.

Planning checks everything that can be checked before memory is allocated; `execute.py` then only makes values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nucleate.deferred import Record, handle_of, held_tensors, record_of, release
from nucleate.deferred.guards import guard, is_edited, retie
from nucleate.deferred.replay import backward_slice
from nucleate.deferred.tape import TensorRef, is_written
from nucleate.devices import is_present
from nucleate.errors import DeferredEditError, DeferredUseError, NucleateError, UninitializedError, name_list
from nucleate.layout import is_sharded
from nucleate.materialize.handover import mark_released, unmark_released
from nucleate.materialize.recipe import Recipe
from nucleate.materialize.vacancies import refuse_recording
from nucleate.shells import named_modules


@dataclass(frozen=True, slots=True)
class Holder:
    """A place that holds a tensor: `getattr(module, name)`.

    Attributes:
        module: The module.
        kind: `"parameter"`, `"buffer"` or `"attribute"`.
        name: The attribute's name.
        fqn: The tensor's FQN.
    """

    module: nn.Module
    kind: str
    name: str
    fqn: str


@dataclass(slots=True)
class Target:
    """One deferred tensor: one object, which the model holds in one place, or in several tied places.

    Attributes:
        tensor: The tensor.
        ref: The tensor's storage on the tape and its geometry there.
        cls: The tensor's class without a guard.
        holders: The places that hold the tensor.
    """

    tensor: Tensor
    ref: TensorRef
    cls: type[Tensor]
    holders: list[Holder] = field(default_factory=list)

    @property
    def fqn(self) -> str:
        """Its first name."""
        return self.holders[0].fqn

    @property
    def size_bytes(self) -> int:
        """The size of its value in bytes."""
        return self.ref.numel * self.ref.dtype.itemsize

    def shards(self) -> list[Any]:
        """Return the distinct DTensors that a strategy has put in its place."""
        # Not `get`: the registry of a scripted module does not have it.
        registries = [(h.module._parameters, h.name) for h in self.holders if h.kind == "parameter"]
        current = [registry[name] for registry, name in registries if name in registry]
        return list({id(parameter): parameter for parameter in current if is_sharded(parameter)}.values())


@dataclass(slots=True)
class Group:
    """The tensors of a model that share one storage, and the recipe of the storage.

    Attributes:
        source: The recipe of the storage.
        targets: The tensors on the storage.
    """

    source: Recipe
    targets: list[Target]


@dataclass(slots=True)
class Plan:
    """The deferred tensors of a model, in the order of their materialization.

    Attributes:
        groups: The storages to make.
    """

    groups: list[Group]

    @classmethod
    def of(cls, model: nn.Module) -> Plan:
        """Find all deferred tensors of `model`. Parameters that `load_state_dict(assign=True)` untied are tied again.

        Raises:
            UsageError: The call is inside the context that constructs the model.
            DeferredEditError: A deferred tensor was edited through an alias since its constructor ended, or a tensor or
                a file that it takes its values from was changed.
            UninitializedError: A parameter or buffer is on the meta device without a recipe, or its recipe never
                writes (all of) it, so that eager construction would leave heap memory there.
        """
        refuse_recording()
        retie(model)
        # Guarded tensors report the device for which they were constructed. The plan needs the real one.
        with torch._C.DisableTorchFunctionSubclass():
            plan = cls._find(_held(model))
        plan._refuse_changed()
        plan._refuse_unwritten()
        return plan

    @classmethod
    def of_tensors(cls, held: Iterable[tuple[Holder, Tensor]]) -> Plan:
        """Find the deferred ones among tensors. Memory that the constructor did not write stays unwritten.

        Args:
            held: The tensors, each with the place that holds it.

        Raises:
            DeferredEditError: See `of`.
        """
        with torch._C.DisableTorchFunctionSubclass():
            plan = cls._find(held)
        plan._refuse_changed()
        return plan

    def check_device(self, device: torch.device) -> None:
        """Make sure that all values can be made for a device. This method changes nothing.

        Args:
            device: The device that needs the values.

        Raises:
            DeferredUseError: The device is absent, or recipes were recorded for another kind of device.
        """
        if self.groups and not is_present(device):
            raise DeferredUseError(
                f"the model is wanted on {str(device)!r}, which this process does not have. Set the model up where "
                "the device is present, or construct it for a device of this process."
            )
        others = [
            (target.fqn, group.source.record.device.type)
            for group in self.groups
            if group.source.record.device.type not in ("cpu", device.type) and group.source.maker(device) is None
            for target in group.targets
        ]
        if others:
            kind = others[0][1]
            raise DeferredUseError(
                f"{name_list([fqn for fqn, _ in others])} were constructed for {kind!r} and are wanted on "
                f"{device.type!r}. Their values come from the generator and the arithmetic of {kind!r}, which "
                f"{device.type!r} does not have. Set the model up on {kind!r} and move it afterwards, or construct it "
                f"for {device.type!r}."
            )

    @classmethod
    def _find(cls, held: Iterable[tuple[Holder, Tensor]]) -> Plan:
        targets: dict[int, Target] = {}
        groups: dict[tuple[int, int], Group] = {}
        foreign: list[str] = []
        edited: list[str] = []
        for holder, tensor in held:
            handle = handle_of(tensor)
            if handle is None:
                if tensor.is_meta and holder.kind != "attribute":
                    foreign.append(holder.fqn)
                continue
            if is_edited(tensor, handle):
                edited.append(holder.fqn)
                continue
            target = targets.get(id(tensor))
            if target is None:
                record = record_of(tensor)
                assert record is not None
                ref = record.tape.ref(tensor)
                target = targets[id(tensor)] = Target(tensor, ref, handle.cls)
                # Records may share a tape.
                group = groups.setdefault((id(record.tape), ref.storage), Group(Recipe(record, ref.storage), []))
                group.targets.append(target)
            target.holders.append(holder)
        if foreign:
            raise UninitializedError(
                f"{len(foreign)} tensors are on the meta device and have no recipe: {name_list(foreign)}. They were "
                'made outside `init_module`, or with `device="meta"`. Construct them inside `init_module`. `setup` '
                "initializes plain parameters and buffers that were built on meta, but no sharded, lazy or sparse ones."
            )
        if edited:
            raise DeferredEditError(
                f"{name_list(edited)} were edited outside the context that records them, through a tensor that shares "
                "their memory; the edit would be lost. Make it inside `init_module`, or after `setup`."
            )
        return cls(sorted(groups.values(), key=lambda group: group.source.order))

    @property
    def targets(self) -> list[Target]:
        """Every deferred tensor."""
        return [target for group in self.groups for target in group.targets]

    @property
    def size_bytes(self) -> int:
        """The number of bytes that all values take together without sharding."""
        return sum(group.source.size_bytes for group in self.groups)

    @property
    def records(self) -> list[Record]:
        """One recording for each tape of the plan."""
        return list({id(group.source.record.tape): group.source.record for group in self.groups}.values())

    def origins(self) -> dict[str, str]:
        """Return the origin of each tensor's value, by the tensor's first name.

        The origin is `"constructor"`, `"checkpoint"`, or the call that `nucleate.materialize.reset` made for it.
        """
        return {target.fqn: group.source.origin for group in self.groups for target in group.targets}

    def release(self) -> None:
        """Remove the guards, so that the tensors are plain meta tensors that a strategy can shard."""
        for target in self.targets:
            release(target.tensor)
            mark_released(target.tensor)

    def restore(self) -> None:
        """Guard the tensors without a value again, after an error."""
        for group in self.groups:
            for target in group.targets:
                unmark_released(target.tensor)
                if target.tensor.is_meta and handle_of(target.tensor) is None:
                    guard(target.tensor, group.source.record, target.fqn)

    def digest(self) -> str:
        """Return a fingerprint that is equal on ranks that deferred the same model, also with other models besides."""
        by_tape: dict[int, list[Target]] = {}
        tapes = {id(target): group.source.record.tape for group in self.groups for target in group.targets}
        for target in sorted(self.targets, key=lambda target: target.fqn):
            by_tape.setdefault(id(tapes[id(target)]), []).append(target)
        parts: list[object] = []
        for targets in by_tape.values():
            tape, numbers = tapes[id(targets[0])], dict[int, int]()
            parts.append(tape.digest(backward_slice(tape, [target.ref.storage for target in targets]), numbers))
            for target in targets:
                number = numbers.setdefault(target.ref.storage, len(numbers))
                parts.append((target.fqn, replace(target.ref, storage=number)))
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _refuse_changed(self) -> None:
        changed: dict[tuple[type[NucleateError], str], list[str]] = {}
        for group in self.groups:
            tape = group.source.record.tape
            for given in tape.givens(backward_slice(tape, [group.source.storage])) if tape.takes_given else ():
                try:
                    given.check_unchanged()
                except NucleateError as error:
                    changed.setdefault((type(error), str(error)), []).append(group.targets[0].fqn)
        if changed:
            kind, _ = next(iter(changed))
            found = "; ".join(f"{reason} ({name_list(fqns)})" for (_, reason), fqns in changed.items())
            raise kind(
                f"the values of some parameters have changed between loading and `setup`: {found}. Load them again, "
                "and change nothing before `setup`."
            )

    def _refuse_unwritten(self) -> None:
        unwritten = [
            target.fqn
            for group in self.groups
            for target in group.targets
            if not is_written(group.source.record.tape, target.ref)
        ]
        if unwritten:
            raise UninitializedError(
                f"nothing initializes {name_list(unwritten)}: the constructor made them with `torch.empty` or the like "
                "and never wrote (all of) them, so they would hold the former contents of the memory. Initialize them "
                "in the constructor, or let `nucleate.materialize.reset` call their modules' `reset_parameters`."
            )

    def __str__(self) -> str:
        origins = self.origins()
        lines = [f"{len(self.targets)} deferred tensors, {self.size_bytes / 2**20:.1f} MiB"]
        for target in self.targets:
            names = " = ".join(holder.fqn for holder in target.holders)
            dtype = str(target.ref.dtype).removeprefix("torch.")
            made_by = origins[target.fqn]
            lines.append(f"{names:60s} {dtype:9s} {target.ref.size!s:20s} {target.size_bytes:>14,d} B  {made_by}")
        return "\n".join(lines)


def _held(model: nn.Module) -> Iterator[tuple[Holder, Tensor]]:
    """Yield the tensors of a model, each with the place that holds it."""
    barren = set[int]()
    for prefix, module in named_modules(model):
        for kind, name, tensor in held_tensors(module, barren):
            yield Holder(module, kind, name, f"{prefix}.{name}" if prefix else name), tensor
