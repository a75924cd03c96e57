"""One seed for every generator, many from one, and their state saved and restored."""

import io
import logging
import os
import random

import numpy as np
import pytest
import torch

from nucleate.cluster.settings import GLOBAL_SEED, SEED_WORKERS
from nucleate.errors import CheckpointKeyError, ConfigurationError
from nucleate.seed import RandomState, derive_seed, last_seed, seed_everything, seeded, seeds_workers
from tests.device import device


def draw() -> tuple[float, float, float, float]:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), torch.rand(()).item()


def draw_everywhere() -> tuple[float, ...]:
    """Draw from the generator of the device as well, if it has one of its own."""
    return (*draw(), torch.rand((), device=device()).item())


def test_the_same_seed_gives_the_same_numbers_everywhere() -> None:
    assert seed_everything(7) == 7
    first = draw_everywhere()
    assert seed_everything(7, workers=False) == 7
    assert draw_everywhere() == first
    assert last_seed() == 7
    assert not seeds_workers()


def test_a_seed_goes_to_started_processes_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GLOBAL_SEED, "1")
    monkeypatch.setenv(SEED_WORKERS, "1")
    seed_everything(7, workers=False, verbose=False)
    assert (os.environ[GLOBAL_SEED], os.environ[SEED_WORKERS]) == ("7", "0")
    assert seed_everything() == 7
    assert os.environ[SEED_WORKERS] == "1"
    assert seeds_workers()


def test_without_a_seed_anywhere_it_is_0_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(GLOBAL_SEED, raising=False)
    with pytest.warns(UserWarning, match="so the seed is 0"):
        assert seed_everything(None) == 0
    monkeypatch.delenv(GLOBAL_SEED)
    assert seed_everything(None, verbose=False) == 0
    caplog.set_level(logging.INFO, "nucleate")
    seed_everything(4, verbose=False)
    assert not caplog.messages
    seed_everything(4)
    assert caplog.messages == ["Seed set to 4."]
    monkeypatch.setenv(GLOBAL_SEED, "four")
    with pytest.raises(ConfigurationError, match="PL_GLOBAL_SEED is 'four', which is not an integer"):
        seed_everything()


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", True])
def test_a_seed_that_some_generator_could_not_take_is_refused(seed: object) -> None:
    with pytest.raises(ConfigurationError, match="must be an integer from 0 to 4294967295"):
        seed_everything(seed)  # type: ignore[arg-type]


def test_derived_seeds_differ_where_any_part_does() -> None:
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (10,), (1, 0, 0)]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    assert derive_seed(1, 2) == 5142973159532490859  # It must not change: runs are resumed with it.
    assert all(0 <= derive_seed(part) < 2**63 for part in range(100))


def test_the_generators_go_on_as_if_nothing_had_been_drawn_inside() -> None:
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with pytest.raises(ZeroDivisionError), seeded(5):
        _ = draw()[0] / 0
    assert draw() == expected


def test_a_saved_state_goes_on_with_the_same_numbers() -> None:
    seed_everything(3)
    draw_everywhere()  # Leaves a cached gauss in Python's generator.
    file = io.BytesIO()
    torch.save(RandomState().state_dict(), file)
    expected = draw_everywhere()
    file.seek(0)
    RandomState().load_state_dict(torch.load(file, weights_only=True))
    assert draw_everywhere() == expected


def test_a_state_without_this_rank_is_refused() -> None:
    with pytest.raises(CheckpointKeyError, match="no random state for rank_0: it was saved by 1 ranks"):
        RandomState().load_state_dict({"rank_9": {}})


def test_the_state_of_a_device_that_is_not_here_is_left_out_and_said() -> None:
    state = RandomState().state_dict()
    state["rank_0"]["cuda" if not torch.cuda.is_available() else "xpu"] = torch.zeros(16, dtype=torch.uint8)
    expected = draw()
    with pytest.warns(UserWarning, match=r"saved with 1 '(cuda|xpu)' device\(s\), and this process uses 0"):
        RandomState().load_state_dict(state)
    assert draw() == expected


def test_the_state_of_a_device_that_torch_does_not_know_is_left_out_and_said() -> None:
    state = RandomState().state_dict()
    state["rank_0"]["unknown"] = (torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8))
    with pytest.warns(UserWarning, match=r"saved with 2 'unknown' device\(s\), and this process uses 0"):
        RandomState().load_state_dict(state)
