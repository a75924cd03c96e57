"""Namespaces, paths and NumPy's numbers in a state: every format gives them back, and stays free of objects."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.checkpoint import convert
from nucleate.checkpoint.state.plain_forms import CLASS, from_plain, to_plain
from nucleate.errors import CheckpointError

VALUES: dict[str, Any] = {
    "namespace": argparse.Namespace(lr=0.1, inner=argparse.Namespace(layers=[1, 2]), name="x", path=Path("/data")),
    "paths": [Path("a/b"), PurePosixPath("/"), PureWindowsPath("C:\\x")],
    "floats": [np.float64(0.1), np.float32(0.1), np.float16("inf"), np.float32("nan")],
    "numbers": (np.int64(-3), np.uint8(255), np.bool_(True), np.complex64(1 + 2j)),
    "texts and dates": [np.str_("é"), np.bytes_(b"\xff"), np.datetime64("2020-01-01T01", "ns"), np.timedelta64(3, "D")],
    "a dict that looks like one": {CLASS: "argparse.Namespace", "items": {"a": 1}},
    "deep": {"a": OrderedDict(b=[({"c": np.int16(7)},)])},
}


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, argparse.Namespace):
        return same(vars(left), vars(right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, np.generic):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    return bool(left == right)


@pytest.mark.parametrize("name", ["last", "folder", "a.safetensors", "a.pt"])
def test_every_format_gives_back_what_was_saved(tmp_path: Path, name: str) -> None:
    runtime, path = Runtime(accelerator="cpu"), tmp_path / name
    model = nn.Linear(2, 2)
    options: dict[str, Any] = {"format": "safetensors"} if name == "folder" else {}
    runtime.save(path, {"model": model, **VALUES}, **options)
    found = runtime.load(path)
    assert all(same(found[key], value) for key, value in VALUES.items())
    state: dict[str, Any] = {"model": model, **dict.fromkeys(VALUES)}
    runtime.load(path, state)
    assert all(same(state[key], value) for key, value in VALUES.items())
    if name == "a.pt":
        assert torch.load(path, weights_only=True)["paths"][0]["path"] == "a/b", "it is read without running code"
        convert(path, tmp_path / "b.safetensors")
        assert same(runtime.load(tmp_path / "b.safetensors")["namespace"], VALUES["namespace"])


def test_a_namespace_may_hold_tensors(tmp_path: Path) -> None:
    runtime = Runtime(accelerator="cpu")
    runtime.save(tmp_path / "a.pt", {"args": argparse.Namespace(mean=torch.ones(3), other=[torch.zeros(1)])})
    found = runtime.load(tmp_path / "a.pt")["args"]
    assert torch.equal(found.mean, torch.ones(3))
    assert torch.equal(found.other[0], torch.zeros(1))


def test_a_class_of_its_own_is_refused_by_its_place(tmp_path: Path) -> None:
    class Own(argparse.Namespace):
        pass

    with pytest.raises(CheckpointError, match=r"args\.items\.x is a .*Own, which a checkpoint cannot hold"):
        Runtime(accelerator="cpu").save(tmp_path / "a.pt", {"args": argparse.Namespace(x=Own())})


@pytest.mark.parametrize(
    "plain",
    [
        {CLASS: "os.system", "path": "x"},
        {CLASS: "argparse.Namespace"},
        {CLASS: "argparse.Namespace", "items": [1]},
        {CLASS: "pathlib.PosixPath", "path": 3},
        {CLASS: "numpy", "dtype": "O", "value": 3},
        {CLASS: "numpy", "dtype": "<U900000000", "value": "a"},
        {CLASS: ["x"]},
    ],
)
def test_a_dict_that_is_not_a_plain_form_stays_as_it_is(plain: Any) -> None:
    assert from_plain(plain) == plain


def test_plain_values_stay_as_they_are() -> None:
    value = {"a": [1, (2.5, None)], "t": torch.ones(1), "n": np.ones(2)}
    plain = to_plain(value)
    assert plain["a"] == value["a"]
    assert plain["t"] is value["t"]
    assert plain["n"] is value["n"]
