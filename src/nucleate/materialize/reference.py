"""The reference: values made a second time, by the slow way that construction itself goes.

Each storage is replayed whole, by one thread after the other operation, and where the random stream stands is found
by drawing all the numbers before it: no jump, no slices, no shards. `verification.py` compares with it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Callable

import torch
from torch import Tensor

from nucleate.deferred.randomness import Cursors, RandomProgram, Workspace, draw, moved
from nucleate.deferred.replay import Pieces, Replayer, pieces_of
from nucleate.deferred.tape import Position, Run, Step
from nucleate.devices.generators import Generator
from nucleate.materialize.parts import parts_of
from nucleate.materialize.recipe import Recipe

# States that are kept for each run, so that going back a little does not mean to draw it all again.
_NUM_KEPT = 64


class DrawnProgram(RandomProgram):
    """A random program that finds its states on the CPU by drawing, and what follows a rejection loop by running it.

    Args:
        program: The program of a recording, of which only the states at the start of each seeded run are taken.
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
            # The state of a device whose distances are known is a counter: there are no numbers to draw on the way.
            return moved(position.run.device, state, position.offset - offset, Workspace())
        generator = torch.Generator()
        generator.set_state(state)
        draw(generator, position.offset - offset)
        state = generator.get_state()
        insort(known, (position.offset, state), key=_offset)
        if len(known) > _NUM_KEPT:
            # The first one is where everything begins.
            del known[1::2]
        return state

    def nearest(self, position: Position) -> tuple[int, Tensor]:
        return position.offset, self.state_at(position)

    def _begun(self, run: Run) -> list[tuple[int, Tensor]]:
        """Return the states that are known of a run, after having found the one at its start."""
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


class DrawnCursors(Cursors):
    """Cursors that get to each place by drawing from the start of its run."""

    def __init__(self, program: DrawnProgram) -> None:
        super().__init__(program)
        self._drawn = program

    def seek(self, position: Position, offset: int, count: int) -> torch.Generator:
        generator = torch.Generator()
        generator.set_state(self._drawn.state_at(Position(position.run, position.offset + offset)))
        return generator

    def remember(self) -> None:
        """Nothing is to be found sooner the next time."""


class Reference:
    """Makes values of recipes once more, independently of how `execute` makes them."""

    def __init__(self) -> None:
        self._replayers: dict[int, Replayer] = {}

    def make(self, recipe: Recipe, device: torch.device) -> torch.UntypedStorage:
        """Return a whole storage: on the CPU, but for what a device draws or computes, which is made there again.

        Args:
            recipe: What makes it.
            device: The device.
        """
        replayer = self._replayer(recipe)
        if replayer.device.type == "cpu":
            return replayer.storage(recipe.storage, replayer.device)
        found = self.pieces(recipe)
        if found is None:
            return replayer.storage(recipe.storage, device)
        pieces, cursors = found
        storage = torch.UntypedStorage(recipe.size_bytes, device="cpu")
        flat = torch.empty(0, dtype=pieces.dtype, device="cpu").set_(storage, 0, (pieces.numel,), (1,))
        for part in parts_of(pieces, 0, flat.shape, (0,), flat):
            part.make(cursors)
        return storage

    def pieces(self, recipe: Recipe) -> tuple[Pieces, Cursors] | None:
        """Return how ranges of a storage on the CPU are made, in drawn places of the stream, or None.

        Args:
            recipe: What makes it.
        """
        replayer = self._replayer(recipe)
        pieces = pieces_of(replayer.tape, replayer.random, recipe.storage)
        assert isinstance(replayer.random, DrawnProgram)
        if pieces is None or (replayer.device.type != "cpu" and not pieces.is_moved):
            return None  # A device draws and computes in its own way, and whole.
        return pieces, DrawnCursors(replayer.random)

    def _replayer(self, recipe: Recipe) -> Replayer:
        record = recipe.record
        if id(record) not in self._replayers:
            replayer = Replayer(record.tape, record.device)
            replayer.random = DrawnProgram(record.replayer.random, replayer.behind)
            self._replayers[id(record)] = replayer
        return self._replayers[id(record)]


def _offset(known: tuple[int, Tensor]) -> int:
    return known[0]
