"""What of staging needs no device: how tensors are cut, and where values are cast."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nucleate.devices import casts_there, slabs

CPU = torch.device("cpu")


@given(
    shape=st.lists(st.integers(0, 7), max_size=4),
    order=st.randoms(use_true_random=False),
    limit=st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_slabs_are_all_elements_in_their_order(shape: list[int], order: object, limit: int) -> None:
    dims = list(range(len(shape)))
    order.shuffle(dims)  # type: ignore[attr-defined]
    tensor = torch.arange(torch.Size(shape).numel()).view(shape).permute(dims)
    done = 0
    for start, part in slabs(tensor, limit):
        assert start == done
        assert 0 < part.numel() <= limit
        assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), "a view, not a copy"
        assert torch.equal(part.reshape(-1), tensor.reshape(-1)[start : start + part.numel()])
        done += part.numel()
    assert done == tensor.numel()


def test_a_contiguous_tensor_is_cut_into_the_fewest_slabs() -> None:
    assert [part.numel() for _, part in slabs(torch.zeros(3, 100), 120)] == [120, 120, 60]


@pytest.mark.parametrize(
    ("source", "target", "there"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.int32, torch.float32, True),
        (torch.bool, torch.int8, True),
        # What an integer makes of a number that it cannot hold depends on the processor.
        (torch.float32, torch.int32, False),
        (torch.float16, torch.int64, False),
        (torch.float32, torch.complex64, True),
        (torch.complex64, torch.float64, False),
    ],
    ids=str,
)
def test_values_are_cast_there_where_that_is_exact_and_moves_no_more_bytes(
    source: torch.dtype, target: torch.dtype, there: bool
) -> None:
    assert casts_there(CPU, source, target) is there


def test_a_dtype_that_the_device_does_not_have_crosses_as_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise TypeError("this device has no such dtype")

    monkeypatch.setattr(torch, "zeros", refuse)
    casts_there.cache_clear()
    try:
        assert casts_there(CPU, torch.float8_e5m2, torch.float32) is False
    finally:
        casts_there.cache_clear()
