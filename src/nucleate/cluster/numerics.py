"""The facts of a process that the bits of a computation depend on besides the program, and their comparison.

Each rank makes its own part of a model, so a difference between two machines would end up inside one parameter.
`nucleate.materialize.dependence` finds the facts that matter for a model. This module reads the facts, compares those
of all ranks and describes the differences.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nucleate.devices import hooks_of
from nucleate.errors import name_list

BUILD = "the torch build"
FILLS = "the CPU capability for random fills"
CAPABILITY = "the CPU capability"
THREADS = "the number of threads"
LIBRARIES = "the fingerprint of the math libraries"
DEVICE = "the device"

_ADVICE = {
    BUILD: "install the same torch on every host",
    FILLS: "set ATEN_CPU_CAPABILITY alike on every rank, or use hosts of one kind",
    CAPABILITY: "set ATEN_CPU_CAPABILITY alike on every rank, or use hosts of one kind",
    THREADS: "set OMP_NUM_THREADS (and MKL_NUM_THREADS, if at all) alike on every rank",
    LIBRARIES: "use hosts of one kind, or set MKL_CBWR alike on every rank where torch uses MKL",
    DEVICE: "use devices of one kind",
}

# `normal_` and `uniform_` give the same bits with both (torch 2.13; tests/materialize/test_dependence.py measures it).
# Code that is compiled for neither rounds differently: another logarithm, and no fused multiplication and addition.
_ALIKE_FOR_FILLS = ("AVX2", "AVX512")


@dataclass(frozen=True, slots=True)
class Numerics:
    """The facts of one process that determine the bits it is going to make.

    Attributes:
        facts: The values of the facts, by name.
        examples: The facts that must be equal on all ranks, by name, each with the FQN of a tensor whose bits depend
            on it.
        trials: The fingerprints of small tensors that were made in a trial, by FQN.
    """

    facts: dict[str, str] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    trials: dict[str, str] = field(default_factory=dict)


def read_facts(device: torch.device) -> dict[str, str]:
    """Return the facts of this process.

    Args:
        device: The device on which the process makes values.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    facts = {
        BUILD: f"{torch.__version__} ({(torch.version.git_version or '')[:8]})",
        FILLS: " or ".join(_ALIKE_FOR_FILLS) if capability in _ALIKE_FOR_FILLS else capability,
        CAPABILITY: capability,
        THREADS: _threads(),
        LIBRARIES: _libraries(),
    }
    if device.type != "cpu":
        facts[DEVICE] = hooks_of(device).describe(device)
    return facts


def fingerprint(tensors: Sequence[Tensor]) -> str:
    """Return a short text that is equal for tensors on the CPU with the same bits."""
    digest = hashlib.blake2b(digest_size=6)
    for tensor in tensors:
        plain = tensor.contiguous()
        digest.update(ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()))
    return digest.hexdigest()


def disagreement(ranks: Sequence[Numerics]) -> str | None:
    """Describe the facts that must be equal but differ between ranks, or return None if all are equal.

    Args:
        ranks: The numerics of each rank, by rank. All ranks have recorded the same model.
    """
    found: list[str] = []
    advice: list[str] = []
    differing = [name for name in ranks[0].facts if len({rank.facts.get(name) for rank in ranks}) > 1]
    for name in differing:
        if name == FILLS and CAPABILITY in ranks[0].examples:
            continue  # The capability itself describes the difference more exactly.
        if name in ranks[0].examples:
            found.append(f"{name} is {_by_value(name, ranks)}, and the bits of {ranks[0].examples[name]} depend on it")
            advice.append(_ADVICE[name])
    tried = [fqn for fqn, mark in ranks[0].trials.items() if any(rank.trials.get(fqn) != mark for rank in ranks)]
    if tried:
        causes = "; ".join(f"{name} is {_by_value(name, ranks)}" for name in differing)
        found.append(
            f"{name_list(tried)} came out with other bits in a trial on each rank"
            + (f", where {causes}" if causes else ", though nothing that nucleate looks at differs between the ranks")
        )
        advice.extend(_ADVICE[name] for name in differing)
    if not found:
        return None
    todo = "; ".join(dict.fromkeys(advice)) or "use hosts of one kind"
    return f"the ranks would make other bits from the same recipes: {'. Also, '.join(found)}. To do: {todo}."


def _by_value(name: str, ranks: Sequence[Numerics]) -> str:
    values: dict[str, list[str]] = {}
    for number, rank in enumerate(ranks):
        values.setdefault(rank.facts.get(name, "unknown"), []).append(str(number))
    return ", ".join(
        f"{value} on rank{'s' if len(numbers) > 1 else ''} {name_list(numbers)}" for value, numbers in values.items()
    )


def _threads() -> str:
    threads = str(torch.get_num_threads())
    # MKL may have a setting of its own.
    mkl = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return threads if mkl is None or mkl[1] == threads else f"{threads} (MKL: {mkl[1]})"


def _libraries() -> str:
    """Return a fingerprint of results of BLAS, LAPACK and vector libraries, which inspect the CPU on their own."""
    results: list[Tensor] = []
    for dtype in (torch.float32, torch.float64):
        # The elements are exact in both dtypes, and too few for any library to start threads.
        matrix = (torch.arange(256, device="cpu") * 7919 % 251).to(dtype).div(256).view(16, 16)
        results += [*torch.linalg.qr(matrix), matrix @ matrix, matrix.exp(), matrix.sin(), matrix.add(1).log()]
    return fingerprint(results)
