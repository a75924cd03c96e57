from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of a library that is not there, but not under CI."""
    for item in items:
        for mark in item.iter_markers("needs"):
            if find_spec(mark.args[0]) is None and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason=f"{mark.args[0]} is not installed"))
