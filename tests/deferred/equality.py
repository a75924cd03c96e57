"""Eager and deferred construction of one model, compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nucleate.deferred import deferred
from nucleate.materialize import materialize


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def bits(tensor: Tensor) -> bytes:
    """Return the content of a tensor as bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same_model(eager: nn.Module, other: nn.Module) -> None:
    """Compare two models: values, dtypes, strides, classes, requires_grad, ties and shared storages."""
    expected, actual = named_tensors(eager), named_tensors(other)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        twin = actual[name]
        for quality in ("dtype", "shape", "device", "requires_grad", "is_leaf"):
            assert getattr(tensor, quality) == getattr(twin, quality), f"{name}: {quality}"
        assert type(tensor) is type(twin), name
        assert tensor.stride() == twin.stride(), name
        assert tensor.storage_offset() == twin.storage_offset(), name
        assert bits(tensor) == bits(twin), f"{name}: other values"
    for first in expected:
        for second in expected:
            assert (expected[first] is expected[second]) == (actual[first] is actual[second]), (first, second)
            shared = expected[first].untyped_storage()._cdata == expected[second].untyped_storage()._cdata
            assert shared == (actual[first].untyped_storage()._cdata == actual[second].untyped_storage()._cdata), (
                first,
                second,
            )


def construct_both(make: Callable[[], nn.Module], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Return the model made eagerly and the same model deferred and materialized, with equal streams asserted."""
    torch.manual_seed(seed)
    eager = make()
    after_eager = torch.rand(5)
    torch.manual_seed(seed)
    with deferred():
        model = make()
    after_construction = torch.rand(5)
    assert torch.equal(after_eager, after_construction), "construction left the random stream elsewhere"
    state = torch.get_rng_state()
    materialize(model)
    assert torch.equal(state, torch.get_rng_state()), "materialization moved the random stream"
    return eager, model


def assert_exact(make: Callable[[], nn.Module]) -> nn.Module:
    """Assert that deferred construction equals eager construction, and return the materialized model."""
    eager, model = construct_both(make)
    assert_same_model(eager, model)
    return model
