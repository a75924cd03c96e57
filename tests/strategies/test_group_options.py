"""The backend and the timeout of a process group."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from nucleate import Runtime
from nucleate.errors import ConfigurationError
from nucleate.strategies import DDPStrategy, FSDPStrategy


@pytest.mark.parametrize("make", [DDPStrategy, FSDPStrategy])
def test_the_options_are_checked_before_anything_starts(make: Any) -> None:
    assert make(process_group_backend="GLOO").process_group_backend == "gloo"
    assert make(timeout=None).timeout == timedelta(minutes=10)
    for wrong in ("glooo", "cpu:glooo", "undefined", 3):
        with pytest.raises(ConfigurationError, match="process_group_backend=.*must be a backend.*gloo"):
            make(process_group_backend=wrong)
    for wrong in (30, timedelta(0)):
        with pytest.raises(ConfigurationError, match="timeout=.*must be a datetime.timedelta above 0"):
            make(timeout=wrong)


def test_a_backend_that_does_not_serve_the_device_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'fake:gloo' does not exchange tensors on cpu devices"):
        Runtime(accelerator="cpu", strategy=DDPStrategy(process_group_backend="fake:gloo"))
