"""Stream cursors: the places of one thread in the random streams that it draws from."""

from __future__ import annotations

import torch

from nucleate.deferred.randomness.mersenne_twister import Stream, Workspace
from nucleate.deferred.randomness.program import RandomProgram
from nucleate.deferred.tape.steps import Position, Run

# An operation on several random tensors draws from several places of the stream in turn.
_NUM_STREAMS = 4


class StreamCursors:
    """Generators at a few places of the random streams. Each request moves the nearest one to the wanted place.

    Two threads must not use one object at the same time.

    Args:
        program: The random program that has the states to begin at, or None if nothing is drawn.
    """

    def __init__(self, program: RandomProgram | None) -> None:
        self._program = program
        self._workspace = Workspace()
        self._streams: list[tuple[Run, Stream]] = []

    def seek(self, position: Position, offset: int, count: int) -> torch.Generator:
        """Return a generator that stands `offset` draws behind a position.

        Args:
            position: A position on a CPU generator.
            offset: The number of draws behind it.
            count: The number of draws that the caller then takes.
        """
        run, target = position.run, position.offset + offset
        near = [item for item in self._streams if item[0] is run and item[1].offset <= target]
        best = max(near, key=lambda item: item[1].offset, default=None)
        if best is None or best[1].offset != target:
            assert self._program is not None
            known, state = self._program.nearest(Position(run, target))
            if best is None or best[1].offset < known:
                best = (run, Stream(state, known))
        # The list is in the order of the last use.
        self._streams = [*(item for item in self._streams if item is not best), best][-_NUM_STREAMS:]
        stream = best[1]
        stream.seek(target, self._workspace)
        stream.offset = target + count
        return stream.generator

    def remember(self) -> None:
        """Give the program the states that the streams have reached."""
        for run, stream in self._streams:
            assert self._program is not None
            self._program.remember(run, stream.offset, stream.generator.get_state())
