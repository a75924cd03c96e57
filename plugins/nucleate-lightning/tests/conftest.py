"""Settings of every test: Lightning is quiet, and its seeding leaves nothing behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Put back the variables that `seed_everything` and the launchers set."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
