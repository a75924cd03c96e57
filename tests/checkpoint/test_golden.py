"""Checkpoints that released versions wrote load in this version, with every value and tie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nucleate import Runtime
from tests.checkpoint.golden_files import GOLDEN, Model, plain_values, training_state, values

CHECKPOINTS = sorted(path for version in GOLDEN.iterdir() for path in version.iterdir())


def test_each_version_has_each_format() -> None:
    assert CHECKPOINTS
    for version in GOLDEN.iterdir():
        names = {path.name for path in version.iterdir()}
        assert {"dcp", "safetensors", "safetensors-in-parts", "one-file.safetensors", "torch.pt"} <= names
        assert {"dcp-2-ranks", "safetensors-2-ranks"} <= names


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_training_goes_on_from_a_checkpoint_of_an_earlier_version(path: Path) -> None:
    runtime = Runtime(accelerator="cpu")
    expected = _expected(runtime, path)
    model = runtime.setup(Model())
    optimizer = runtime.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-9))
    rest = runtime.load(path, {"model": model, "optimizer": optimizer}, remainder=True)
    assert model.head.weight is model.embedding.weight
    _same(dict(model.state_dict()), dict(expected["model"].state_dict()))
    _same(optimizer.state_dict(), expected["optimizer"].state_dict())
    _same(dict(rest), plain_values())


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_deferred_model_takes_the_weights_of_an_earlier_version(path: Path) -> None:
    runtime = Runtime(accelerator="cpu")
    expected = _expected(runtime, path)
    with runtime.init_module(empty_init=True):
        model = Model()
    runtime.load_raw(path, model)
    made = runtime.setup(model)
    assert made.head.weight is made.embedding.weight
    _same(dict(made.state_dict()), dict(expected["model"].state_dict()))


def _expected(runtime: Runtime, path: Path) -> dict[str, Any]:
    state = training_state(runtime)
    if path.name.endswith("-ranks"):  # These were written before the first step.
        state["model"] = values(Model())
        state["optimizer"] = torch.optim.AdamW(state["model"].parameters(), lr=0.5, foreach=False)
    return state


def _same(found: Any, expected: Any) -> None:
    """Compare nested values, and tensors with their dtypes, to the last bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        bits = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in (found, expected)]
        assert torch.equal(*bits)
    elif isinstance(expected, dict):
        assert list(found) == list(expected) or set(found) == set(expected)
        for key, value in expected.items():
            _same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    else:
        assert found == expected
