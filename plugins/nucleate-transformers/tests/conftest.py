"""For the suites that torchrun starts on several ranks, and for what transformers says while it works."""

from __future__ import annotations

import os
import tempfile

import pytest
import transformers


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Ranks that tidy up one folder of temporary folders at the same time find files gone that they were to remove.
    if "RANK" in os.environ and config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix=f"nucleate-rank{os.environ['RANK']}-")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
