"""The way of one weight: the functions of nucleate that run from `init_module` to the end of `setup`."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest

# One layer before, so that what happens once in a process is not counted.
PROGRAM = """
import os, sys
import nucleate
from nucleate import Runtime
from torch import nn

ROOT = os.path.dirname(nucleate.__file__) + os.sep
runtime = Runtime(accelerator="cpu")
calls = []

def construct():
    with runtime.init_module(empty_init=True):
        model = nn.Linear(64, 64, bias=False)
    return runtime.setup(model)

def count(frame, event, argument):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(ROOT):
        calls.append(f"{code.co_filename.removeprefix(ROOT)} {code.co_name}")

construct()
sys.setprofile(count)
construct()
sys.setprofile(None)
print("\\n".join(calls))
"""


@pytest.fixture(scope="module")
def calls() -> Counter[tuple[str, str]]:
    """The number of calls of each function, by its file and its name. A generator counts again for each item."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    return Counter(tuple(line.split(" ", 1)) for line in done.stdout.splitlines())  # type: ignore[misc]


def test_a_guard_goes_on_once_and_off_once(calls: Counter[tuple[str, str]]) -> None:
    assert calls["deferred/guards/handle.py", "attach"] == 1
    assert calls["deferred/guards/handle.py", "release"] == 1


def test_the_model_is_walked_once_for_each_question(calls: Counter[tuple[str, str]]) -> None:
    # What was constructed; which are inference tensors; which tensors have no value; what is made; and whose recording
    # goes on while the precision changes the model.
    num_tensors = 1
    assert calls["deferred/module_tensors.py", "held_tensors"] == 5 * (num_tensors + 1)
    assert calls["materialize/vacancies.py", "vacancies"] == 1
    assert calls["materialize/plan.py", "of"] == 1


def test_not_more_files_run_than_have_to(calls: Counter[tuple[str, str]]) -> None:
    assert len({file for file, _ in calls}) <= 80
