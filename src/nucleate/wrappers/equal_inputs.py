"""The search for ranks that train on the same inputs, because nobody has split their data.

The first training steps of each model are looked at. Each rank counts itself in the group's store under a hash of its
inputs, and the rank that completes the count warns. So no rank waits for another one.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import warnings
from threading import get_ident
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

from nucleate.cluster.tally import Tally
from nucleate.cluster.watch.position import user_line
from nucleate.wrappers.deliveries import Deliveries

#: The number of training forwards of a model that are looked at.
_NUM_FORWARDS = 3
#: Larger inputs are not looked at, because hashing takes time.
_MOST_BYTES = 16 * 2**20
_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device)


@final
class EqualInputs:
    """The search for equal inputs of one model.

    Args:
        model: The name of the model's class.
        tally: Counts ranks with equal inputs.
        num_ranks: The number of ranks that split the data.
        deliveries: The loops over the runtime's loaders. The inputs in such a loop are not looked at.
    """

    def __init__(self, model: str, tally: Tally, num_ranks: int, deliveries: Deliveries) -> None:
        self._model, self._tally, self._num_ranks = model, tally, num_ranks
        self._deliveries = deliveries
        self._num_forwards = 0

    def look(self, inputs: Any) -> bool:
        """Look at the inputs of a training forward, warn if all ranks have the same, and return whether to go on.

        Args:
            inputs: The arguments of forward.
        """
        self._num_forwards += 1
        if not self._deliveries.open():
            digest = _digest(inputs)
            if digest and self._tally.completes(f"{self._num_forwards}/{digest}"):
                self._warn()
                return False
        return self._num_forwards < _NUM_FORWARDS

    def _warn(self) -> None:
        names = _loaders(sys._getframe(1))
        loader = f"The DataLoader {names[0]!r} was" if names else "If they come from a DataLoader, it was"
        warnings.warn(
            f"all {self._num_ranks} data parallel ranks gave {self._model} the same inputs in training forward "
            f"{self._num_forwards}, at {user_line(get_ident())}. So they train on the same samples. {loader} not given "
            "to `runtime.setup_dataloaders`, which gives each rank its part: write `loader = "
            "runtime.setup_dataloaders(loader)`. If the inputs are meant to be equal, silence this warning by "
            "`warnings.filterwarnings('ignore', message='all .* data parallel ranks gave')`.",
            stacklevel=2,
        )


def _digest(inputs: Any) -> str:
    """Return a hash of all values of the inputs, or `""` without a tensor, and with objects of unknown values."""
    digest = hashlib.blake2b(digest_size=16)
    num_bytes = 0
    leaves, form = tree_flatten(inputs)
    digest.update(repr(form).encode())
    for leaf in leaves:
        if isinstance(leaf, _PLAIN):
            digest.update(repr(leaf).encode())
            continue
        if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided or leaf.is_meta:
            return ""
        num_bytes += leaf.numel() * leaf.element_size()
        if leaf.is_quantized or num_bytes > _MOST_BYTES:
            return ""
        try:
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(_bytes(leaf))
        except RuntimeError:  # Inside a transformation of functions, tensors have no memory.
            return ""
    return digest.hexdigest() if num_bytes else ""


def _bytes(tensor: Tensor) -> bytes:
    own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # torch has no other quick way from a tensor to bytes without NumPy, which the core does not need.
    return ctypes.string_at(own.data_ptr(), own.numel() * own.element_size())


def _loaders(frame: FrameType | None) -> list[str]:
    """Return the names of variables of the calling functions that hold a plain DataLoader, the innermost first."""
    names: list[str] = []
    while frame is not None:
        names += [name for name, value in list(frame.f_locals.items()) if isinstance(value, DataLoader)]
        frame = frame.f_back
    return [name for name in names if name != "self"]
