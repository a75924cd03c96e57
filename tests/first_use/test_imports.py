"""A first use imports nucleate, and of torch and other packages only what is imported without nucleate."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.first_use.imports import LATE, assert_same_imports, imports


@pytest.mark.parametrize("group", ["plain", "transformers", pytest.param("diffusers", marks=pytest.mark.long), "ways"])
def test_a_first_use_imports_what_it_imports_without_nucleate(group: str) -> None:
    found = assert_same_imports(group)
    if group == "plain":
        # Nor does torch itself import any of these while it makes them.
        late = {name: [module for module in both["ours"] if module.startswith(LATE)] for name, both in found.items()}
        assert not any(late.values()), late


def test_a_model_from_a_configuration_needs_no_code_for_checkpoints() -> None:
    for name, both in imports("transformers").items():
        assert "nucleate_transformers.construction" in both["ours"], name
        assert "nucleate_transformers.binding" not in both["ours"], name
        assert "nucleate.checkpoint.raw_loader" not in both["ours"], name


def test_installed_packages_are_searched_once() -> None:
    # Torch searches as well, for one group.
    program = """
import torch
import importlib.metadata as metadata
searches = []
plain = metadata.entry_points
metadata.entry_points = lambda **options: searches.append(options) or plain(**options)
from nucleate import Runtime
with Runtime(accelerator="cpu", strategy="single_device").init_module(empty_init=True):
    pass
print(len(searches))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"
