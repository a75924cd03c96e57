"""Nobody waits for a rank that will not come: every rank raises one error that says where all ranks are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.multi.ranks import fork_unattended

SCRIPT = Path(__file__).parent / "scripts" / "watch.py"


@dataclass
class Outcome:
    rank: int
    seconds: float
    error: str
    text: str


def cases(all_of: Iterable[tuple[str, ...]], short: Container[tuple[str, ...]]) -> list[Any]:
    """Return all cases, of which only the short ones run by default."""
    return [pytest.param(*case, marks=() if case in short else pytest.mark.long) for case in all_of]


def outcomes(case: str, strategy: str, folder: Path, nproc: int = 2, timeout: float = 150) -> tuple[list[Outcome], str]:
    # No launcher ends a rank because another one has failed.
    _, stdout, stderr = fork_unattended(SCRIPT, nproc, case, strategy, folder, timeout=timeout)
    found = [Outcome(**json.loads(line)) for line in stdout.splitlines() if line.startswith("{")]
    assert found, stderr
    assert "SIGABRT" not in stderr
    return sorted(found, key=lambda one: one.rank), stderr


@pytest.mark.parametrize(
    ("call", "strategy"),
    cases(
        itertools.product(["save", "load", "load_raw", "setup", "all_reduce", "barrier"], ["ddp", "fsdp"]),
        short={("save", "fsdp"), ("load", "ddp"), ("setup", "fsdp"), ("all_reduce", "ddp")},
    ),
)
def test_a_call_of_one_rank_ends_in_seconds(call: str, strategy: str, tmp_path: Path) -> None:
    found, stderr = outcomes(f"only {call}", strategy, tmp_path)
    assert [one.error for one in found] == ["RankDisagreementError"] * 2, stderr
    for one in found:
        assert f"rank 0 is in {call} and rank 1 is in " in one.text
        assert f"rank 0 has been in {call} for " in one.text
        assert "watch.py:" in one.text
        assert one.seconds < 15


def test_one_rank_evaluates_a_replica(tmp_path: Path) -> None:
    found, stderr = outcomes("only evaluate", "ddp", tmp_path)
    assert [one.error for one in found] == ["", ""], stderr


def test_one_rank_cannot_evaluate_a_sharded_model(tmp_path: Path) -> None:
    found, stderr = outcomes("only evaluate", "fsdp", tmp_path)
    assert [one.error for one in found] == ["RankDisagreementError"] * 2, stderr
    assert "rank 0 is in forward" in found[0].text or "rank 1 is in barrier and rank 0 is in forward" in found[0].text


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_with_more_steps_learns_that_the_other_has_ended(strategy: str, tmp_path: Path) -> None:
    (first, second), stderr = outcomes("uneven", strategy, tmp_path)
    assert first.error == "", stderr
    assert second.error == "RankFailedError", stderr
    assert "rank 0 has ended its script. Rank 1 needs it in " in second.text
    assert "Connection closed" not in stderr


@pytest.mark.parametrize(
    ("how", "where", "strategy"),
    cases(
        itertools.product(["killed", "exit", "raises"], ["init", "load", "step"], ["ddp", "fsdp"]),
        short={
            ("killed", "step", "fsdp"),
            ("exit", "load", "ddp"),
            ("exit", "init", "fsdp"),
            ("raises", "step", "ddp"),
        },
    ),
)
def test_the_end_of_a_rank_ends_the_others(how: str, where: str, strategy: str, tmp_path: Path) -> None:
    found, stderr = outcomes(f"{where} {how}", strategy, tmp_path)
    first = found[0]
    assert first.rank == 0
    assert first.error == "RankFailedError", stderr
    expected = "rank 1 has ended by ValueError: out of cheese" if how == "raises" else "rank 1 has died"
    assert expected in first.text


def test_a_rank_that_is_gone_before_the_second_forward_is_named(tmp_path: Path) -> None:
    (first,), stderr = outcomes("forward killed", "ddp", tmp_path)
    assert first.error == "RankFailedError", stderr
    assert "rank 1 has died" in first.text
    assert "Rank 0 needs it in forward." in first.text


def test_four_ranks_hear_of_one_that_is_gone(tmp_path: Path) -> None:
    found, stderr = outcomes("step killed", "fsdp", tmp_path, nproc=4)
    assert [(one.rank, one.error) for one in found] == [(rank, "RankFailedError") for rank in (0, 2, 3)], stderr
    assert all("rank 1 has died" in one.text for one in found)


def test_different_calls_are_named_at_once(tmp_path: Path) -> None:
    found, stderr = outcomes("names", "ddp", tmp_path)
    assert [one.error for one in found] == ["RankDisagreementError"] * 2, stderr
    assert all("the ranks have entered different calls: all_reduce, broadcast." in one.text for one in found)
    assert all(one.seconds < 5 for one in found)


def test_another_call_beside_a_barrier_is_named(tmp_path: Path) -> None:
    found, stderr = outcomes("barrier", "ddp", tmp_path)
    assert [one.error for one in found] == ["RankDisagreementError"] * 2, stderr
    assert all("rank 0 is in broadcast and rank 1 is in barrier" in one.text for one in found)


@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.long)])
def test_a_rank_that_waits_for_long_says_so_and_goes_on(seconds: int, tmp_path: Path) -> None:
    found, stderr = outcomes(f"late {seconds}", "ddp", tmp_path)
    assert [one.error for one in found] == ["", ""]
    (line,) = [line for line in stderr.splitlines() if line.startswith("nucleate: ")]
    assert "rank 1 has been in barrier for" in line
    assert "and goes on waiting. rank 0 is at " in line


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_step_of_one_rank_ends_all(strategy: str, tmp_path: Path) -> None:
    # Under FSDP collectives of different sizes may meet. gloo then aborts a process, which shows its stacks.
    codes, stdout, stderr = fork_unattended(SCRIPT, 2, "only backward", strategy, tmp_path, timeout=150)
    # Rank 0's step goes together with a later one of rank 1, which may be through then.
    assert codes[0] != 0
    for rank, code in enumerate(codes):
        assert "Fatal Python error: Aborted" in stderr if code < 0 else f'{{"rank": {rank}, ' in stdout


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_that_are_late_are_no_alarm(strategy: str, tmp_path: Path) -> None:
    found, stderr = outcomes("mixed 200", strategy, tmp_path, nproc=4, timeout=290)
    assert [one.error for one in found] == [""] * 4, stderr
