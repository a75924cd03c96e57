"""What differs between ranks is put into words: the fact, its values, what depends on it and what to do."""

from __future__ import annotations

import re

import pytest
import torch

from nucleate.cluster.numerics import (
    BUILD,
    CAPABILITY,
    FILLS,
    LIBRARIES,
    THREADS,
    Numerics,
    disagreement,
    fingerprint,
    read_facts,
)

FACTS = {BUILD: "2.13", FILLS: "AVX2 or AVX512", CAPABILITY: "AVX512", THREADS: "1", LIBRARIES: "abc"}


def test_what_matters_to_nobody_is_not_refused() -> None:
    ranks = [Numerics(FACTS), Numerics({**FACTS, THREADS: "2", CAPABILITY: "AVX2"})]
    assert disagreement(ranks) is None


def test_a_fact_that_matters_is_named_with_values_ranks_example_and_advice() -> None:
    examples = {THREADS: "head.weight"}
    ranks = [Numerics({**FACTS, THREADS: value}, examples) for value in ("1", "8", "1", "8")]
    text = disagreement(ranks)
    assert text is not None
    assert re.search(r"number of threads is 1 on ranks 0, 2, 8 on ranks 1, 3,.*bits of head\.weight", text)
    assert "OMP_NUM_THREADS" in text
    assert "ATEN_CPU_CAPABILITY" not in text


def test_a_capability_is_named_once() -> None:
    examples = {FILLS: "a", CAPABILITY: "b"}
    other = {**FACTS, FILLS: "DEFAULT", CAPABILITY: "DEFAULT"}
    text = disagreement([Numerics(FACTS, examples), Numerics(other, examples)])
    assert text is not None
    assert text.count("capability is") == 1
    assert "bits of b" in text


@pytest.mark.parametrize(("threads", "cause"), [("2", "where the number of threads is 1 on rank 0"), ("1", "nothing")])
def test_a_trial_that_came_out_differently_is_named_with_what_may_be_the_cause(threads: str, cause: str) -> None:
    ranks = [Numerics(FACTS, {}, {"table": "x"}), Numerics({**FACTS, THREADS: threads}, {}, {"table": "y"})]
    text = disagreement(ranks)
    assert text is not None
    assert "table came out with other bits" in text
    assert cause in text


def test_facts_are_those_of_this_process_and_the_same_again() -> None:
    facts = read_facts(torch.device("cpu"))
    assert facts[BUILD].startswith(torch.__version__)
    assert facts[CAPABILITY] == torch.backends.cpu.get_cpu_capability()
    assert facts == read_facts(torch.device("cpu"))


def test_a_fingerprint_sees_every_bit() -> None:
    tensor = torch.zeros(3, 5)
    other = tensor.clone()
    other[2, 4] = -0.0
    assert fingerprint([tensor.t()]) == fingerprint([torch.zeros(5, 3)])
    assert fingerprint([tensor]) != fingerprint([other])
