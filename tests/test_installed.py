"""The whole check (`.ci/run`, which sets CI) skips no test for want of a package that it can install."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest


@pytest.mark.skipif("CI" not in os.environ, reason="a part of the tests may be run without all packages")
@pytest.mark.parametrize(
    "package",
    ["accelerate", "bitsandbytes", "diffusers", "lightning_fabric", "litgpt", "nucleate_bitsandbytes", "torchrec"],
)
def test_a_package_that_tests_would_be_skipped_without_is_installed(package: str) -> None:
    assert find_spec(package) is not None
