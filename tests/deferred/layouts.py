"""Tensors as they may lie in memory: contiguous, permuted, channels last, expanded or with gaps."""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.tape.leaves import tensors

KINDS = ("contiguous", "permuted", "channels last", "expanded", "with gaps")


def shape(random: Random, least: int = 0, most: int = 4) -> list[int]:
    """Return up to four lengths, some of them equal, some one."""
    return [random.choice((1, 1, 2, 3, 4, 4, 6, 9)) for _ in range(random.randint(least, most))]


def broadcast(random: Random, lengths: list[int]) -> list[int]:
    """Return a shape that broadcasts to another one."""
    shorter = lengths[random.randint(0, len(lengths)) :] if random.random() < 0.3 else lengths
    return [random.choice((1, length, length)) for length in shorter]


def laid_out(random: Random, lengths: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of ones of a shape."""
    kind = random.choice(KINDS)
    if kind == "permuted":
        order = random.sample(range(len(lengths)), len(lengths))
        permuted = torch.ones([lengths[dim] for dim in order], dtype=dtype)
        return permuted.permute([order.index(dim) for dim in range(len(lengths))])
    if kind == "channels last" and len(lengths) == 4:
        return torch.ones(lengths, dtype=dtype).to(memory_format=torch.channels_last)
    if kind == "expanded":
        return torch.ones([random.choice((1, length)) for length in lengths], dtype=dtype).expand(lengths)
    if kind == "with gaps":
        longer = torch.ones([length + random.choice((0, 1)) for length in lengths], dtype=dtype)
        return longer[tuple(slice(length) for length in lengths)]
    return torch.ones(lengths, dtype=dtype)


def looks(value: Any) -> list[tuple[torch.dtype, torch.Size, tuple[int, ...]]]:
    """Return what is to be seen of the tensors in a result without their content."""
    return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors(value)]
