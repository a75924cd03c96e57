"""Ranks whose CPUs or threads would make other bits say so before anything is made; other differences are no matter."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tests.multi.ranks import fork_ranks, run_ranks

SCRIPT = Path(__file__).parent / "scripts" / "numerics.py"


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this CPU has one capability only"
)
def test_another_cpu_capability_is_refused_where_a_value_depends_on_it() -> None:
    capability = r"CPU capability.* is AVX2 or AVX512 on rank 0, DEFAULT on rank 1.*bits of [01]\.weight.*ATEN_CPU"
    cases = [f"{strategy}:{model}={capability}" for strategy in ("ddp", "fsdp") for model in ("normal", "linear")]
    cases += ["ddp:uniform", "fsdp:uniform", "fsdp:table"]
    start = time.monotonic()
    done = run_ranks(SCRIPT, 2, "ATEN_CPU_CAPABILITY", "default", *cases)
    assert done.stdout.count("as it should be") == 2
    # Collectives would wait for ten minutes.
    assert time.monotonic() - start < 60


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="this CPU has no AVX512")
def test_two_capabilities_that_make_the_same_bits_go_together() -> None:
    done = run_ranks(SCRIPT, 2, "ATEN_CPU_CAPABILITY", "avx2", "ddp:normal", "fsdp:normal", "fsdp:uniform", "ddp:table")
    assert done.stdout.count("as it should be") == 2


@pytest.mark.long
def test_another_number_of_threads_is_refused_where_a_value_depends_on_it() -> None:
    threads = r"number of threads is 1 on rank 0, 2 on rank 1.*bits of 1\.weight depend on it.*OMP_NUM_THREADS"
    cases = [f"{strategy}:orthogonal={threads}" for strategy in ("ddp", "fsdp")]
    cases += ["ddp:powers=number of threads is 1 on rank 0, 2 on rank 1", "ddp:normal", "fsdp:linear", "fsdp:table"]
    done = run_ranks(SCRIPT, 2, "OMP_NUM_THREADS", "2", *cases)
    assert done.stdout.count("as it should be") == 2


def test_another_build_of_torch_is_refused_where_a_value_depends_on_it() -> None:
    build = r"the torch build is .* on rank 0, 9\.9\.9 \(.*on rank 1.*bits of weight.*install the same torch"
    done = fork_ranks(SCRIPT, 2, "torch", "9.9.9", f"ddp:table={build}", f"fsdp:table={build}", "fsdp:constants")
    assert done.stdout.count("as it should be") == 2
