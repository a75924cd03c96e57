"""The data of several ranks are those of one process, in its order; and so is the loss of the README's training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks

SCRIPTS = Path(__file__).parent / "scripts"


def test_the_order_is_that_of_one_process() -> None:
    assert fork_ranks(SCRIPTS / "data_order.py", 2).stdout.count("in order") == 2


def test_the_twenty_lines_of_the_readme_print_the_same_loss_on_every_number_of_ranks() -> None:
    losses = [float(fork_ranks(SCRIPTS / "readme.py", num).stdout.split("loss ")[1].split()[0]) for num in (1, 2, 4)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_equal_inputs_of_all_ranks_are_noticed_once_and_others_never() -> None:
    assert fork_ranks(SCRIPTS / "equal_inputs.py", 2).stdout.count("noticed") == 2
