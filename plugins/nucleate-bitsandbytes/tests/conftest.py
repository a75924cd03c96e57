"""For the suites that torchrun starts on several ranks: each has temporary folders of its own."""

from __future__ import annotations

import os
import tempfile

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Ranks that tidy up one folder of temporary folders at the same time find files gone that they were to remove.
    if "RANK" in os.environ and config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix=f"nucleate-rank{os.environ['RANK']}-")
