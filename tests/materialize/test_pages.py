"""The choice of pages, on times that are given."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nucleate.materialize.pages import STRETCH_BYTES, PagePolicy

MS = 1e-3


class Machine:
    """A machine on which stretches take given times.

    Args:
        policy: It is asked.
        huge_s: Seconds for a stretch in a huge page.
        small_s: Seconds in small pages.
    """

    def __init__(self, policy: PagePolicy, huge_s: float, small_s: float) -> None:
        self.policy = policy
        self.seconds = {True: huge_s, False: small_s}
        self.asked: list[bool] = []

    def touch(self, stretches: int) -> float:
        """Touch memory; return the seconds that it took."""
        total = 0.0
        for _ in range(stretches):
            huge = self.policy.choose()
            self.asked.append(huge is not False)
            if huge is not None:
                self.policy.took(huge, self.seconds[huge])
            total += self.seconds[huge is not False]
        return total


def test_small_pages_are_taken_where_huge_ones_are_slow() -> None:
    machine = Machine(PagePolicy(), huge_s=4 * MS, small_s=0.5 * MS)
    machine.touch(2000)
    assert machine.asked[:1] == [True]
    assert machine.asked.count(True) < 8
    assert not machine.policy.is_huge


def test_huge_pages_stay_where_they_are_quick() -> None:
    machine = Machine(PagePolicy(), huge_s=0.2 * MS, small_s=0.5 * MS)
    machine.touch(2000)
    assert machine.asked.count(False) < 30
    assert machine.policy.is_huge


@pytest.mark.parametrize(("huge_s", "small_s"), [(4, 0.5), (0.2, 0.5), (6, 0.5), (0.06, 0.12), (2, 1.9), (0.3, 4)])
def test_choosing_loses_about_one_percent(huge_s: float, small_s: float) -> None:
    machine = Machine(PagePolicy(), huge_s * MS, small_s * MS)
    best = min(huge_s, small_s) * MS
    start = machine.touch(8)
    assert start <= 8 * best + 4 * abs(huge_s - small_s) * MS
    if _is_clear(huge_s, small_s):
        assert machine.touch(10_000) <= 1.015 * 10_000 * best


def _is_clear(one: float, other: float) -> bool:
    return max(one, other) > 1.25 * min(one, other)


def test_it_changes_its_mind_when_the_machine_runs_out_of_memory_that_was_just_in_use() -> None:
    machine = Machine(PagePolicy(), huge_s=0.2 * MS, small_s=0.5 * MS)
    machine.touch(300)
    machine.seconds[True] = 4 * MS
    machine.asked.clear()
    machine.touch(200)
    assert machine.asked.count(True) <= 6
    assert not machine.policy.is_huge


def test_it_comes_back_to_huge_pages_when_they_are_quick_again() -> None:
    machine = Machine(PagePolicy(), huge_s=4 * MS, small_s=0.5 * MS)
    machine.touch(50)
    machine.seconds[True] = 0.2 * MS
    machine.touch(2000)
    assert machine.policy.is_huge
    machine.asked.clear()
    machine.touch(100)
    assert machine.asked.count(True) > 95


def test_a_single_slow_stretch_of_many_changes_nothing_for_long() -> None:
    machine = Machine(PagePolicy(), huge_s=0.2 * MS, small_s=0.5 * MS)
    machine.touch(500)
    machine.policy.took(True, 13 * MS)
    machine.asked.clear()
    machine.touch(500)
    assert machine.policy.is_huge
    assert machine.asked.count(False) < 10


def test_a_slow_moment_of_a_trial_does_not_count() -> None:
    policy = PagePolicy()
    policy.took(True, 4 * MS)
    policy.took(True, 4 * MS)
    for seconds in (13 * MS, 0.5 * MS):
        assert policy.choose() is False
        policy.took(False, seconds)
    assert not policy.is_huge


def test_a_slow_first_page_does_not_decide() -> None:
    machine = Machine(PagePolicy(), huge_s=0.2 * MS, small_s=0.5 * MS)
    machine.policy.took(True, 3 * MS)
    machine.touch(100)
    assert machine.policy.is_huge
    assert machine.asked.count(True) > 90


def test_pages_that_were_there_already_teach_nothing() -> None:
    machine = Machine(PagePolicy(), huge_s=0.2 * MS, small_s=0.5 * MS)
    machine.touch(100)
    said = machine.policy.describe()
    for _ in range(100):
        machine.policy.took(True, 5e-6)
    assert machine.policy.is_huge
    assert machine.policy.describe() == said


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("seconds", [(4, 0.5), (0.2, 0.5)])
def test_a_setting_fixes_the_choice(fixed: bool, seconds: tuple[float, float]) -> None:
    machine = Machine(PagePolicy(fixed), *(each * MS for each in seconds))
    machine.touch(500)
    assert set(machine.asked) == {fixed}
    assert machine.policy.is_huge is fixed


def test_quick_huge_pages_are_mostly_left_to_their_writers() -> None:
    policy = PagePolicy()
    for _ in range(2):
        policy.took(True, 0.2 * MS)
    answers = [policy.choose() for _ in range(2 + 400)]
    assert answers[:2] == [False, False]
    assert answers[2:].count(True) == 100
    assert answers[2:].count(None) == 300
    assert {policy.choose(may_leave=False) for _ in range(8)} == {True}
    assert policy.describe().startswith(f"{302 * STRETCH_BYTES / 2**30:.2f} GiB in huge pages")


def test_it_describes_what_was_touched() -> None:
    policy = PagePolicy()
    assert policy.describe() == "nothing"
    for _ in range(2**30 // STRETCH_BYTES):
        policy.took(True, 0.25 * MS)
    policy.took(False, 0.5 * MS)
    assert policy.describe() == (
        "1.00 GiB in huge pages (0.25 ms for 2 MiB) and 0.00 GiB in small pages (0.50 ms for 2 MiB)"
    )


def test_many_threads_may_ask_before_any_answer_comes() -> None:
    policy = PagePolicy()
    policy.took(True, 4 * MS)
    policy.took(True, 4 * MS)
    answers: list[Callable[[], None]] = []
    asked = [policy.choose() for _ in range(8)]
    assert asked.count(False) == 2
    for huge in filter(lambda huge: huge is not None, asked):
        answers.append(lambda huge=huge: policy.took(huge, 4 * MS if huge else 0.5 * MS))  # type: ignore[misc]
    for answer in answers:
        answer()
    assert not policy.is_huge
    assert policy.choose() is False
