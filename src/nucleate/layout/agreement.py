"""The agreement of ranks on values, shown by fingerprints instead of broadcasts.

Replicas that every rank made by itself are equal if each rank followed the recipes. A fingerprint of a sample of each
tensor shows whether they are equal. Real tensors that the user supplied may differ by rank; all ranks then take the
values of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nucleate.cluster.communicator import Communicator
from nucleate.errors import RankDisagreementError, name_list
from nucleate.layout.placements import is_sharded
from nucleate.shells import named_buffers, named_parameters

#: The number of elements in the sample for a fingerprint. Another seed or kernel changes nearly every element.
SAMPLE_SIZE = 4096
#: The number of elements that are widened to int64 at a time.
CHUNK_SIZE = 1 << 20

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_replicas(model: nn.Module, communicator: Communicator) -> None:
    """Check that every tensor that ranks hold whole is equal on all ranks. DTensors are skipped.

    Args:
        model: A model without deferred tensors.
        communicator: The communicator of this process.

    Raises:
        RankDisagreementError: A parameter or buffer differs; the message gives its FQN. Every rank raises it.
    """
    if communicator.world_size == 1:
        return
    differing = _differing(_replicated(model), communicator, sample=True)
    if differing:
        raise RankDisagreementError(
            f"the ranks made different values for {name_list(differing)} from the same recipes. The ranks' CPUs, "
            "thread counts or torch builds differ in a way that changes bits: use hosts of one kind, or set "
            "ATEN_CPU_CAPABILITY and OMP_NUM_THREADS alike on all of them."
        )


def broadcast_real(model: nn.Module, communicator: Communicator) -> list[str]:
    """Give every real parameter and buffer that differs between ranks the value it has on rank 0.

    Args:
        model: A model whose deferred tensors, if any, are on the meta device.
        communicator: The communicator of this process.

    Returns:
        The FQNs that differed.

    Raises:
        RankDisagreementError: A tensor has another dtype or shape on some rank. Every rank raises it.
    """
    if communicator.world_size == 1:
        return []
    named = dict(_replicated(model))
    differing = _differing(named.items(), communicator, sample=False)
    for name in differing:
        with torch.no_grad():
            value = named[name].contiguous()
            # As bytes: backends lack some dtypes.
            dist.broadcast(value.view(-1).view(torch.uint8), src=0)
            if value.data_ptr() != named[name].data_ptr():
                named[name].copy_(value)
    return differing


def differing_copies(model: nn.Module, communicator: Communicator) -> dict[str, list[int]]:
    """Find parts of tensors that several ranks hold with different bits. Every element counts.

    Args:
        model: A model without deferred tensors.
        communicator: The communicator of this process.

    Returns:
        FQNs, each with the ranks that differ from the lowest rank that holds the same part; equal on every rank.
    """
    if communicator.world_size == 1:
        return {}
    marks = {key: (str(t.dtype), tuple(t.shape), *_fingerprint(t, sample=False)) for key, t in _held(model)}
    gathered = communicator.gather_objects(marks)
    differing: dict[str, list[int]] = {}
    for key in dict.fromkeys(key for other in gathered for key in other):
        holders = [rank for rank, other in enumerate(gathered) if key in other]
        wrong = [rank for rank in holders if gathered[rank][key] != gathered[holders[0]][key]]
        if wrong:
            differing[key[0]] = sorted({*differing.get(key[0], []), *wrong})
    return differing


def _held(model: nn.Module) -> Iterable[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors of this rank, each with a key: the FQN, and for a shard also its boxes."""
    named: Iterable[tuple[str, Any]] = (*named_parameters(model), *named_buffers(model))
    for name, tensor in named:
        if is_sharded(tensor):
            chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.__create_chunk_list__()]
            yield (name, *chunks), tensor.to_local().detach()
        elif not tensor.is_meta:
            yield (name,), tensor.detach()


def _replicated(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in (*named_parameters(model), *named_buffers(model)):
        if not tensor.is_meta and not hasattr(tensor, "device_mesh"):
            yield name, tensor.detach()


def _differing(named: Iterable[tuple[str, Tensor]], communicator: Communicator, sample: bool) -> list[str]:
    marks = {name: (str(t.dtype), tuple(t.shape), *_fingerprint(t, sample)) for name, t in named}
    gathered = communicator.gather_objects(marks)
    everywhere = set(marks).intersection(*gathered)
    names = sorted({name for other in gathered for name in other} - everywhere)
    if names:
        raise RankDisagreementError(
            f"only some ranks have the tensors {name_list(names)}. Construct the same model on every rank."
        )
    for name in marks:
        for rank, other in enumerate(gathered):
            if other[name][:2] != gathered[0][name][:2]:
                raise RankDisagreementError(
                    f"{name} is {gathered[0][name][0]} of shape {gathered[0][name][1]} on rank 0, but {other[name][0]} "
                    f"of shape {other[name][1]} on rank {rank}. Construct the same model on every rank."
                )
    return [name for name in marks if any(other[name] != gathered[0][name] for other in gathered)]


def _fingerprint(tensor: Tensor, sample: bool) -> tuple[int, int]:
    """Return two sums over the words of a tensor, or over a sample of its elements."""
    plain = tensor.resolve_conj().resolve_neg()
    flat = (plain.dequantize() if plain.is_quantized else plain).contiguous().view(-1)
    if sample:
        flat = flat[:: max(1, flat.numel() // SAMPLE_SIZE)].contiguous()
    words = flat.view(_WORDS.get(flat.element_size(), torch.uint8))
    first = second = 0
    for start in range(0, words.numel(), CHUNK_SIZE):
        chunk = words[start : start + CHUNK_SIZE].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + chunk.numel(), device=chunk.device)
        first, second = first + int(chunk.sum()), second + int((chunk * places).sum())
    return first, second
