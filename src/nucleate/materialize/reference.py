"""The reference: values made a second time, in the slow way of construction itself.

One thread replays each storage whole, one operation after the other. It finds a position in the random stream by
drawing all numbers before the position, without jumps, slices or shards. `verification.py` compares with these values.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable

import torch
from torch import Tensor

from nucleate.deferred.randomness import RandomProgram, StreamCursors, Workspace, draw, moved
from nucleate.deferred.replay import RangeMaker, Replayer, maker_of
from nucleate.deferred.tape import Position, Run, Step
from nucleate.devices.generators import Generator
from nucleate.materialize.parts import parts_of
from nucleate.materialize.recipe import Recipe

# The number of states that are kept for each run, so that a short way back does not draw all numbers again.
_NUM_KEPT = 64


class DrawnProgram(RandomProgram):
    """A random program that finds states on the CPU by drawing, and those after a rejection loop by running the loop.

    Args:
        program: The program of a recording. Only its states at the start of each seeded run are used.
        execute: See `RandomProgram`.
    """

    def __init__(self, program: RandomProgram, execute: Callable[[Tensor, Step], Tensor]) -> None:
        super().__init__(execute)
        self._program = program
        self._drawn: dict[Run, list[tuple[int, Tensor]]] = {}

    def generators(self, default: Generator) -> list[Generator]:
        return self._program.generators(default)

    def state_at(self, position: Position) -> Tensor:
        known = self._begun(position.run)
        place = bisect_right(known, position.offset, key=_offset) - 1
        offset, state = known[place]
        if offset == position.offset:
            return state
        if position.run.device != "cpu":
            # The state of a device with known distances is a counter, so no numbers have to be drawn.
            return moved(position.run.device, state, position.offset - offset, Workspace())
        generator = torch.Generator()
        generator.set_state(state)
        draw(generator, position.offset - offset)
        state = generator.get_state()
        insort(known, (position.offset, state), key=_offset)
        if len(known) > _NUM_KEPT:
            # The first state stays, because every search can begin there.
            del known[1::2]
        return state

    def nearest(self, position: Position) -> tuple[int, Tensor]:
        return position.offset, self.state_at(position)

    def _begun(self, run: Run) -> list[tuple[int, Tensor]]:
        """Return the known states of a run, after finding the state at its start."""
        unknown = [run]
        while unknown[-1] not in self._drawn and (behind := unknown[-1].behind) is not None:
            unknown.append(behind[0].run)
        for begun in reversed(unknown):
            if begun in self._drawn:
                continue
            if begun.behind is None:
                assert begun.state is not None
                state = begun.state
            else:
                state = self._execute(self.state_at(begun.behind[0]), begun.behind[1])
            self._drawn[begun] = [(0, state)]
        return self._drawn[run]


class DrawnCursors(StreamCursors):
    """Cursors that reach each position by drawing from the start of its run."""

    def __init__(self, program: DrawnProgram) -> None:
        super().__init__(program)
        self._drawn = program

    def seek(self, position: Position, offset: int, count: int) -> torch.Generator:
        generator = torch.Generator()
        generator.set_state(self._drawn.state_at(Position(position.run, position.offset + offset)))
        return generator

    def remember(self) -> None:
        """Do nothing: these cursors have no positions for later use."""


class Reference:
    """A maker of the values of recipes, independent of the way in which `execute` makes them."""

    def __init__(self) -> None:
        self._replayers: dict[int, Replayer] = {}

    def make(self, recipe: Recipe, device: torch.device) -> torch.UntypedStorage:
        """Return a whole storage, made on the CPU. Values that a device draws or computes are made on the device again.

        Args:
            recipe: The recipe of the storage.
            device: The device.
        """
        replayer = self._replayer(recipe)
        if replayer.device.type == "cpu":
            return replayer.storage(recipe.storage, replayer.device)
        found = self.maker(recipe)
        if found is None:
            return replayer.storage(recipe.storage, device)
        maker, cursors = found
        storage = torch.UntypedStorage(recipe.size_bytes, device="cpu")
        flat = torch.empty(0, dtype=maker.dtype, device="cpu").set_(storage, 0, (maker.numel,), (1,))
        for part in parts_of(maker, 0, flat.shape, (0,), flat):
            part.make(cursors)
        return storage

    def maker(self, recipe: Recipe) -> tuple[RangeMaker, StreamCursors] | None:
        """Return the maker of a storage's ranges on the CPU, with cursors that draw to reach positions, or None.

        Args:
            recipe: The recipe of the storage.
        """
        replayer = self._replayer(recipe)
        maker = maker_of(replayer.tape, replayer.random, recipe.storage)
        assert isinstance(replayer.random, DrawnProgram)
        if maker is None or (replayer.device.type != "cpu" and not maker.is_moved):
            return None  # A device draws and computes in its own way, and only whole storages.
        return maker, DrawnCursors(replayer.random)

    def _replayer(self, recipe: Recipe) -> Replayer:
        record = recipe.record
        if id(record) not in self._replayers:
            replayer = Replayer(record.tape, record.device)
            replayer.random = DrawnProgram(record.replayer.random, replayer.behind)
            self._replayers[id(record)] = replayer
        return self._replayers[id(record)]


def _offset(known: tuple[int, Tensor]) -> int:
    return known[0]
