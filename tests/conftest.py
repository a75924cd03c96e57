"""What holds for every test: no CUDA, no `cuda` test; nothing process-wide is left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from nucleate.cluster import process_group
from tests.device import ACCELERATOR, on_device

if ACCELERATOR == "sim":
    from tests.sim.conftest import *  # noqa: F403 - its fixtures, for every test
    from tests.sim.device import NoCompiler, install

    # Now: libraries ask torch for its accelerator while they are imported. Without a compiler the fixtures skip.
    with suppress(NoCompiler):
        install().set_available(False)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Ranks that tidy up one folder of temporary folders at the same time find files gone that they were to remove.
    if "RANK" in os.environ and config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix=f"nucleate-rank{os.environ['RANK']}-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        # Those in tests/gpu can run on the simulated device instead (tests/gpu/device.py).
        stands_in = os.environ.get("NUCLEATE_TEST_DEVICE") == "sim" and item.path.parent.name == "gpu"
        if "cuda" in item.keywords and not stands_in:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test after which torch's process-wide settings are not what they were."""
    before = _settings()
    yield
    after = _settings()
    torch.set_default_dtype(torch.float32)
    assert after == before


@pytest.fixture(scope="module", autouse=True)
def no_group_left_behind() -> Iterator[None]:
    """End the process group of a single process: which file comes next in this process is chance."""
    yield
    if "RANK" not in os.environ and process_group.is_running():
        process_group.stop()


@pytest.fixture
def factories_on_device() -> Iterator[None]:
    """Let factories make tensors on the device of the tests, as they do for users who set a default device."""
    with on_device():
        yield


def _settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad enabled": torch.is_grad_enabled(),
        "torch modes": torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack(),
        "trunc_normal_": torch.nn.init._no_grad_trunc_normal_,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
