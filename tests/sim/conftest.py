"""The simulated device for every test of this folder: there, with late copies, and put away afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.sim.device import NoCompiler, install

# So that tests may name the device before it is there.
torch.utils.rename_privateuse1_backend("sim")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install before any test runs a backward pass, which is too late, if a test of this folder is to run."""
    if any(Path(__file__).parent in item.path.parents for item in session.items):
        with contextlib.suppress(NoCompiler):  # the fixture says it
            install().set_available(False)


@pytest.fixture(scope="session")
def simulated_device() -> Any:
    """The controls of the device; without a compiler its tests are skipped, and where CI is set they fail."""
    try:
        sim = install()
    except NoCompiler as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    sim.set_available(False)
    return sim


@pytest.fixture(autouse=True)
def sim(simulated_device: Any) -> Iterator[Any]:
    """The controls of the device, which is available, at index 0, seeded, and copies late."""
    sim = simulated_device
    sim.set_available(True)
    sim.set_device(0)
    torch.sim.manual_seed_all(0)  # type: ignore[attr-defined]
    sim.reset_counts()
    sim.set_late(True)
    try:
        yield sim
    finally:
        try:
            sim.synchronize()
        finally:
            sim.set_late(False)
            sim.set_available(False)
            sim.set_device(0)
