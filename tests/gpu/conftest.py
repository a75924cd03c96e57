"""What holds for every test of a GPU: which device it runs on, what it needs, and arithmetic that can be compared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.device import DEVICE_TYPE, IS_SIMULATED, REASONS, count


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "two_gpus: needs two devices; skipped where there are fewer")
    config.addinivalue_line("markers", "only_on_gpu(reason): skipped on the simulated device, for a reason of REASONS")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = count()
    for item in items:
        only = item.get_closest_marker("only_on_gpu")
        if only is not None and IS_SIMULATED:
            item.add_marker(pytest.mark.skip(reason=REASONS[only.args[0]].text))
        if item.get_closest_marker("two_gpus") is not None and found < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs two devices of type {DEVICE_TYPE}, found {found}"))


@pytest.fixture(autouse=True)
def comparable_arithmetic() -> Iterator[None]:
    """Compute in full float32 and with algorithms that give the same bits each time."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = before
