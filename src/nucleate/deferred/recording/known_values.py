"""Known values: values that a constructor looks at, remembered as long as they are current.

Each look at a value replays the steps that lead to it. The values made on the way become known too, if their storages
are still alive. Each known value goes on the tape as a step that overwrites its storage, so that the next look begins
there. So a chain of looks, each at a value computed from the one before, costs as much as the chain. Memory is bounded:
the values that were unused longest leave the tape, and all of them leave it when recording ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from nucleate.deferred.replay.replayer import Replayer, backward_slice, view
from nucleate.deferred.tape.steps import Constant, Step, TensorRef
from nucleate.deferred.tape.tape import Tape

aten = torch.ops.aten

#: How much memory known values may take.
LIMIT_BYTES = 1 << 28


class KnownValues:
    """The values of deferred storages, while they are recorded.

    Args:
        replayer: The replayer, which makes values and has the tape.
        limit_bytes: How much memory known values may take.
    """

    def __init__(self, replayer: Replayer, limit_bytes: int = LIMIT_BYTES) -> None:
        self._replayer = replayer
        self._limit_bytes = limit_bytes
        # By the address of the meta storage: the step that holds its value, and the value. Numbers of storages change
        # when tapes join.
        self._known: OrderedDict[int, tuple[Step, torch.UntypedStorage]] = OrderedDict()

    @property
    def _tape(self) -> Tape:
        return self._replayer.tape

    def of(self, tensor: Tensor) -> Tensor:
        """Return the value that a deferred tensor has now. It must not be written to."""
        ref = self._tape.ref(tensor)
        return view(self.know([ref.storage])[ref.storage], ref)

    def of_storage(self, storage: int) -> torch.UntypedStorage:
        """Return new memory with the content that a storage has now."""
        memory = self.know([storage])[storage]
        self._forget(self._key(storage))
        return memory

    def know(self, storages: Sequence[int]) -> dict[int, torch.UntypedStorage]:
        """Return the present content of storages, and remember it."""
        found = {storage: memory for storage in storages if (memory := self._current(storage)) is not None}
        missing = [storage for storage in storages if storage not in found]
        if missing:
            steps = backward_slice(self._tape, missing)
            passed = self._worth_keeping(steps, missing)
            made = self._replayer.contents(steps, [*missing, *passed])
            for storage in (*passed, *missing):
                self._remember(storage, made[storage])
            found.update((storage, made[storage]) for storage in missing)
        return found

    def forget(self) -> None:
        """Take every known value off the tape."""
        for key in list(self._known):
            self._forget(key)

    def _key(self, storage: int) -> int:
        return int(self._tape.storage(storage)._cdata)

    def _current(self, storage: int) -> torch.UntypedStorage | None:
        """Return the known content if it is current, or None. Replaying can begin at old content, too."""
        key = self._key(storage)
        if key not in self._known:
            return None
        step, memory = self._known[key]
        if self._tape.writers(storage)[-1] != step.index or memory.nbytes() != self._tape.size_bytes(storage):
            return None
        self._known.move_to_end(key)
        return memory

    def _worth_keeping(self, steps: list[Step], wanted: Sequence[int]) -> list[int]:
        """Return the storages that the steps leave with their present content, and that live tensors can still read."""
        indices = {step.index for step in steps}
        passed = dict.fromkeys(storage for step in steps for storage in (*step.creates, *step.writes))
        return [
            storage
            for storage in passed
            if storage not in wanted
            and self._current(storage) is None
            and self._tape.writers(storage)[-1] in indices
            and self._tape.is_alive(storage)
            and self._tape.size_bytes(storage) <= self._limit_bytes
        ]

    def _remember(self, storage: int, memory: torch.UntypedStorage) -> None:
        size_bytes = self._tape.size_bytes(storage)
        if not 0 < memory.nbytes() == size_bytes <= self._limit_bytes:
            return
        self._forget(self._key(storage))
        held_bytes = sum(other.nbytes() for _, other in self._known.values())
        while held_bytes + size_bytes > self._limit_bytes:
            oldest = next(iter(self._known))
            held_bytes -= self._known[oldest][1].nbytes()
            self._forget(oldest)
        whole = TensorRef(storage, torch.uint8, (size_bytes,), (1,), 0, False, False)
        constant = Constant(torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory))
        # Not by `overwrite`, which drops the storage's last element source: this step may be dropped again.
        step = self._tape.append(
            self._tape.step(
                aten.copy_.default, (whole, constant), outputs=(whole,), written=(whole,), overwrites=(storage,)
            )
        )
        self._known[self._key(storage)] = step, memory

    def _forget(self, key: int) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._tape.drop(known[0])
