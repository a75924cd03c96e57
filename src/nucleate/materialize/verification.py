"""Verification: the values that `setup` installed are compared with values made a second time in an independent way.

It takes the plan after the precision has added its casts and before the strategy lays the model out. Afterwards it
reads the model's registries, so it works for every strategy: each rank compares the whole tensors and the shards that
it holds. `reference.py` makes the second values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from nucleate.cluster.communicator import Communicator
from nucleate.deferred import RangeMaker, StreamCursors, held_tensors
from nucleate.deferred.randomness import is_contiguous
from nucleate.deferred.replay import backward_slice, view
from nucleate.deferred.tape import TensorRef
from nucleate.errors import VerificationError, name_list
from nucleate.layout import cut, is_sharded, offsets_of
from nucleate.layout.agreement import differing_copies
from nucleate.materialize.parts import parts_of
from nucleate.materialize.plan import Group, Plan, Target
from nucleate.materialize.reference import Reference
from nucleate.shells import named_modules

#: A sample makes at most so many elements again, intermediate results included.
SAMPLE_NUMEL = 1 << 24
#: For a larger tensor, windows of about so many elements are made at the beginning, in the middle and at the end of a
#: rank's part.
WINDOW_NUMEL = 1 << 16
#: Windows are made for at most so many larger tensors, always for the last one.
NUM_WINDOWED = 64
#: The number of bytes that are compared at a time.
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that differs from its recipe.

    Attributes:
        fqn: The tensor's FQN.
        text: A description of the difference.
    """

    fqn: str
    text: str


class Verification:
    """The recipes of a model, kept while a strategy sets the model up, and the check of its values afterwards.

    Args:
        model: The model, with its precision applied and still deferred.
        everything: Whether to check every tensor; else a sample. For each kind of recipe (its operations, its dtype,
            tied or not) the sample has the smallest, the largest and the last tensor. Others follow, spread over the
            model, as long as all take at most `SAMPLE_NUMEL` elements. Larger tensors are checked in windows, except
            those that can only be made whole.
        device: The device on which the strategy makes values.
    """

    def __init__(self, model: nn.Module, everything: bool, device: torch.device) -> None:
        self._model = model
        self._plan = Plan.of(model)
        self._everything = everything
        self._device = device
        self._places = {id(target.tensor): _places(target) for target in self._plan.targets}

    def run(self, communicator: Communicator) -> None:
        """Compare the model's values with its recipes, and the values that several ranks hold with one another.

        Args:
            communicator: The communicator of this process.

        Raises:
            VerificationError: A value differs. The message gives the FQN, the index, the values and the rank.
            RankFailedError: A value differs on another rank.
        """
        chosen = [(group, True) for group in self._plan.groups] if self._everything else _sample(self._plan)
        with communicator.all_or_none("verification"), self._plainly():
            _refuse(self._compare(chosen), communicator)
        differing = differing_copies(self._model, communicator)
        with communicator.all_or_none("verification"), self._plainly():
            # The recipe shows which of the copies is wrong, and where.
            concerned = [g for g in self._plan.groups if any(h.fqn in differing for t in g.targets for h in t.holders)]
            _refuse(self._compare([(group, True) for group in concerned]), communicator)
            if differing:
                listed = name_list(f"{fqn} (rank {name_list(map(str, ranks))})" for fqn, ranks in differing.items())
                raise VerificationError(
                    f"ranks that hold the same part of a tensor hold different values of {listed}. They were equal or "
                    "taken from rank 0 before: something has written to them on some ranks only."
                )

    def _compare(self, chosen: Iterable[tuple[Group, bool]]) -> Iterator[Mismatch]:
        """Compare the tensors of some groups with their recipes, in the given order: each whole, or in windows."""
        reference = Reference()
        modules = dict(named_modules(self._model))
        for group, is_whole in chosen:
            held = [(fqn, actual, target) for target in group.targets for fqn, actual in self._held(target, modules)]
            recorded_for = group.source.record.device
            found = None if is_whole else reference.maker(group.source)
            if found is not None:
                for fqn, actual, target in held:
                    yield from self._compare_windows(fqn, actual, target.ref, *found)
            elif is_whole or recorded_for.type != "cpu":
                # Values that only move to a device are compared on the CPU: a copy of the reference to the device would
                # go the same way.
                storage = reference.make(group.source, self._device)
                for fqn, actual, target in held:
                    text = _difference(actual, view(storage, target.ref), storage.device)
                    if text:
                        yield Mismatch(fqn, text)

    def _compare_windows(
        self, fqn: str, actual: Tensor, ref: TensorRef, maker: RangeMaker, cursors: StreamCursors
    ) -> Iterator[Mismatch]:
        if actual.shape != ref.size or actual.dtype != ref.dtype:
            yield Mismatch(fqn, _other_layout(actual, ref.dtype, ref.size))
            return
        offsets = offsets_of(actual) if is_sharded(actual) else (0,) * actual.dim()
        if offsets is None or not is_contiguous(ref) or ref.dtype != maker.dtype:
            return
        local = (cast(Any, actual).to_local() if is_sharded(actual) else actual).detach()
        for row, rows in _windows(local.shape):
            begin = (offsets[0] + row, *offsets[1:])
            part = local.narrow(0, row, rows).cpu()
            expected = torch.empty(part.shape, dtype=ref.dtype, device="cpu")
            for piece in parts_of(maker, ref.offset, ref.size, begin, expected):
                piece.make(cursors)
            text = _first_difference(part, expected, begin)
            if text:
                yield Mismatch(fqn, text)

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Compute without the caller's modes, as in materialization."""
        with ExitStack() as stack:
            for record in self._plan.records:
                stack.enter_context(record.making())
            yield

    def _held(self, target: Target, modules: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor that the target's places hold now, once, with its FQN."""
        seen: set[int] = set()
        for place in self._places[id(target.tensor)]:
            tensor = place.look(modules)
            if tensor is None:
                raise VerificationError(
                    f"{place.fqn} is no longer there after `setup`: the strategy has removed or renamed it, so its "
                    "value cannot be verified. Use verify=False with this strategy."
                )
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield place.fqn, tensor


@dataclass(frozen=True, slots=True)
class _Place:
    """A place where a model holds a tensor, by names that stay valid when a strategy replaces the tensor or the module.

    Attributes:
        fqn: The tensor's FQN.
        module: The module's name.
        kind: See `Holder`.
        name: The attribute's name.
        number: The tensor's number under that name, where the attribute is a collection.
    """

    fqn: str
    module: str
    kind: str
    name: str
    number: int

    def look(self, modules: dict[str, nn.Module]) -> Tensor | None:
        """Return the tensor that this place holds now, or None."""
        if self.module not in modules:
            return None
        held = [t for kind, name, t in held_tensors(modules[self.module]) if (kind, name) == (self.kind, self.name)]
        return held[self.number] if self.number < len(held) else None


def _places(target: Target) -> list[_Place]:
    """Return the places of a target. Attributes count only without other places: a strategy need not replace them."""
    registered = [holder for holder in target.holders if holder.kind != "attribute"]
    places = []
    for holder in registered or target.holders:
        held = [t for kind, name, t in held_tensors(holder.module) if (kind, name) == (holder.kind, holder.name)]
        number = next(number for number, tensor in enumerate(held) if tensor is target.tensor)
        prefix = holder.fqn[: -len(holder.name) - 1]
        places.append(_Place(holder.fqn, prefix, holder.kind, holder.name, number))
    return places


def _sample(plan: Plan) -> list[tuple[Group, bool]]:
    """Return the groups to check, in order, each with whether to make it whole. All ranks get the same result."""
    kinds: dict[object, list[tuple[int, int]]] = {}
    large: list[int] = []
    for number, group in enumerate(plan.groups):
        steps = backward_slice(group.source.record.tape, [group.source.storage])
        cost = sum(max((ref.numel for ref in (*step.outputs, *step.written)), default=0) for step in steps)
        if cost > SAMPLE_NUMEL:
            large.append(number)
            continue
        tied = len(group.targets) > 1 or len(group.targets[0].holders) > 1
        kind = (frozenset(str(step.func) for step in steps), group.targets[0].ref.dtype, tied)
        kinds.setdefault(kind, []).append((cost, number))
    chosen: set[int] = set()
    room = SAMPLE_NUMEL

    def choose(members: Iterable[tuple[int, int]]) -> None:
        nonlocal room
        for cost, number in members:
            if number not in chosen and cost <= room:
                chosen.add(number)
                room -= cost

    choose(min(members) for members in kinds.values())
    choose(max(members, key=_number) for members in kinds.values())
    choose(max(members) for members in kinds.values())
    # Every 16th group first, then the groups between.
    rest = sorted((member for members in kinds.values() for member in members), key=_number)
    for start in range(16):
        choose(rest[start::16])
    stride = -(-len(large) // NUM_WINDOWED) or 1
    return [(plan.groups[number], number in chosen) for number in sorted({*chosen, *large[::-stride]})]


def _number(member: tuple[int, int]) -> int:
    return member[1]


def _refuse(mismatches: Iterable[Mismatch], communicator: Communicator) -> None:
    found = list(mismatches)
    if not found:
        return
    names = list(dict.fromkeys(mismatch.fqn for mismatch in found))
    others = f" {name_list(names[1:])} differ as well." if len(names) > 1 else ""
    raise VerificationError(
        f"{found[0].fqn} on rank {communicator.rank} differs from its recipe: {found[0].text}.{others} Either "
        "something writes to parameters while they are set up, or nucleate, torch or the machine has made a mistake: "
        "please report it."
    )


def _difference(actual: Tensor, expected: Tensor, device: torch.device) -> str:
    """Describe the first difference between a rank's tensor and the whole value, or return an empty text."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return _other_layout(actual, expected.dtype, expected.shape)
    if not is_sharded(actual):
        return _first_difference(actual.detach().to(device), expected, (0,) * actual.dim())
    local = cast(Any, actual).to_local().detach().to(device)
    # If the part is not a box of the whole, the index is the one in this rank's part.
    return _first_difference(local, cut(actual, expected), offsets_of(actual) or (0,) * actual.dim())


def _windows(shape: torch.Size) -> list[tuple[int, int]]:
    """Return (first row, number of rows) of the windows of a tensor."""
    row_numel = math.prod(shape[1:])
    if not shape[0] or not row_numel or row_numel > SAMPLE_NUMEL:
        return []
    rows = min(shape[0], max(1, WINDOW_NUMEL // row_numel))
    return [(row, rows) for row in sorted({0, (shape[0] - rows) // 2, shape[0] - rows})]


def _other_layout(actual: Tensor, dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"it is {actual.dtype} of shape {tuple(actual.shape)} but was recorded as {dtype} of shape {tuple(shape)}"


def _first_difference(actual: Tensor, expected: Tensor, offsets: tuple[int, ...]) -> str:
    """Describe the first element that differs, by its index in the whole tensor, or return an empty text."""
    first, second = (t.resolve_conj().resolve_neg().contiguous().view(-1) for t in (actual, expected))
    step = max(1, CHUNK_BYTES // max(1, actual.element_size()))
    for start in range(0, first.numel(), step):
        left, right = (
            t[start : start + step].view(torch.uint8).view(-1, actual.element_size()) for t in (first, second)
        )
        if torch.equal(left, right):
            continue
        place = start + int((left != right).any(1).nonzero()[0])
        index, rest = [], place
        for length, offset in zip(reversed(actual.shape), reversed(offsets), strict=True):
            index.append(rest % length + offset)
            rest //= length
        return f"element {tuple(reversed(index))} is {first[place].item()!r} but should be {second[place].item()!r}"
    return ""
