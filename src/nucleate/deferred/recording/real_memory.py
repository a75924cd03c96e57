"""Real memory of deferred tensors: somebody holds this memory and can write it where no recorder sees the write.

NumPy, DLPack, a raw address and `untyped_storage()` share memory with a tensor. From the moment one of them is handed
out, the memory itself holds the tensor's value. Operations that write it run at once. Operations that read it take a
copy. Materialization gives the tensor this same memory, shared as eager construction would have shared it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nucleate.deferred.replay.replayer import Replayer, view
from nucleate.deferred.tape.steps import Constant, TensorRef
from nucleate.deferred.tape.tape import Tape


class RealMemory:
    """The storages of a tape that have real memory.

    Args:
        replayer: The replayer, which has the tape and the device that deferred tensors stand for.
    """

    def __init__(self, replayer: Replayer) -> None:
        self._replayer = replayer
        # Memory by the address of its meta storage, and the reverse. Numbers of storages change when tapes join.
        self._memory: dict[int, torch.UntypedStorage] = {}
        self._meta: dict[int, torch.UntypedStorage] = {}

    @property
    def _tape(self) -> Tape:
        return self._replayer.tape

    def absorb(self, other: RealMemory) -> None:
        """Take over the real memory of another tape."""
        self._memory.update(other._memory)
        self._meta.update(other._meta)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a deferred tensor lies on real memory."""
        if not self._memory or self._tape.number(tensor) is None:
            return False
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self._memory

    def meta_of(self, memory: torch.UntypedStorage) -> torch.UntypedStorage | None:
        """Return the storage without memory that stands for a real storage, or None."""
        return self._meta.get(memory._cdata)

    def add(self, number: int, memory: torch.UntypedStorage) -> None:
        """Give a storage real memory from here on."""
        meta = self._tape.storage(number)
        self._memory[meta._cdata] = memory
        self._meta[memory._cdata] = meta
        whole = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
        ref = TensorRef(number, torch.uint8, (memory.nbytes(),), (1,), 0, False, False)
        args = (Constant(whole), self._replayer.device)
        self._tape.append(self._tape.step(_exposed, args, outputs=(ref,), creates=(number,)))

    def adopt(self, real: Tensor) -> Tensor:
        """Return a deferred tensor on the memory of a real one."""
        memory = real.untyped_storage()
        storage = self.meta_of(memory)
        if storage is None:
            whole = torch.empty(memory.nbytes(), dtype=torch.uint8, device="meta")
            self.add(self._tape.add_storage(whole), memory)
            storage = whole.untyped_storage()
        meta = torch.empty(0, dtype=real.dtype, device="meta")
        meta.set_(storage, real.storage_offset(), real.size(), real.stride())
        if real.is_conj():
            meta = torch._conj(meta)
        return torch._neg_view(meta) if real.is_neg() else meta

    def view(self, tensor: Tensor) -> Tensor:
        """Return a real tensor on the memory of a deferred one."""
        return view(self._memory[tensor.untyped_storage()._cdata], self._tape.ref(tensor))

    def resize(self, tensor: Tensor) -> None:
        """Resize real memory to the present size of a deferred tensor's storage."""
        storage = tensor.untyped_storage()
        memory = self._memory.get(storage._cdata)
        if memory is not None and memory.nbytes() != storage.nbytes():
            memory.resize_(storage.nbytes())


def _exposed(memory: Tensor, device: torch.device) -> Tensor:
    return memory.to(device)
