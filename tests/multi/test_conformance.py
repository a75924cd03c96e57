"""The conformance suites on several ranks, one pytest per rank."""

import pytest

from tests.multi.ranks import fork_ranks


@pytest.mark.parametrize(
    ("name", "nproc"),
    [
        ("TestDDP", 2),
        ("TestFSDP", 2),
        pytest.param("TestHSDP", 4, marks=pytest.mark.long),
        ("TestTensorParallel", 2),
        pytest.param("Test2D", 4, marks=pytest.mark.long),
    ],
)
def test_a_strategy_passes_its_suite_on_several_ranks(name: str, nproc: int) -> None:
    check("conformance", name, nproc)


@pytest.mark.parametrize(
    ("name", "nproc"),
    [
        pytest.param("TestTensorParallel", 4, marks=pytest.mark.long),
        pytest.param("TestFullyShard", 4, marks=pytest.mark.long),
        pytest.param("TestReplicate", 2, marks=pytest.mark.long),
        pytest.param("TestActivationCheckpointing", 2, marks=pytest.mark.long),
    ],
)
def test_a_dimension_passes_its_suite_on_several_ranks(name: str, nproc: int) -> None:
    check("dimension_conformance", name, nproc)


def check(file: str, name: str, nproc: int) -> None:
    # -x, because a rank that fails a test and goes on leaves the others waiting for it in the last one.
    result = fork_ranks("pytest", nproc, "-x", "-q", f"tests/multi/{file}.py::{name}", timeout=400)
    assert result.stdout.count(" passed") == nproc
