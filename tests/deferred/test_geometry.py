"""The geometry of results that torch's own meta kernels do not tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nucleate.deferred.recording import meta_shapes
from nucleate.deferred.recording.meta_shapes import result_on_meta
from tests.deferred.layouts import looks

aten = torch.ops.aten


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (1, 1), (1, 3), (3, 1), (2, 5, 3), (2, 3, 4, 4)], ids=str)
def test_a_factorization_has_the_geometry_of_the_real_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    real = torch.randn(shape, dtype=dtype)
    made = result_on_meta(torch.ops.aten.geqrf.default, (real.to("meta"),), {}, fills=False)
    for expected, actual in zip(torch.geqrf(real), made, strict=True):
        assert actual.is_meta
        assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())


def test_torch_still_has_no_meta_kernel_for_it() -> None:
    with pytest.raises(NotImplementedError):
        torch.geqrf(torch.empty(3, 3, device="meta"))


def image(channels: int = 4) -> Tensor:
    return torch.ones(2, channels, 64, 64)


LAYERS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "convolution": lambda x: (
        aten.convolution.default, x, torch.ones(6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1,
    ),
    "transposed convolution": lambda x: (
        aten.convolution.default, x, torch.ones(4, 6, 3, 3), torch.ones(6), [2, 2], [1, 1], [1, 1], True, [1, 1], 1,
    ),
    "group norm": lambda x: (aten.native_group_norm.default, x, torch.ones(4), torch.ones(4), 2, 4, 64 * 64, 2, 1e-5),
    "layer norm": lambda x: (aten.native_layer_norm.default, x, [64], torch.ones(64), torch.ones(64), 1e-5),
    "average pooling": lambda x: (aten.avg_pool2d.default, x, [2, 2]),
    "maximum pooling": lambda x: (aten.max_pool2d_with_indices.default, x, [3, 3], [2, 2]),
    "adaptive pooling": lambda x: (aten._adaptive_avg_pool2d.default, x, [5, 5]),
    "interpolation": lambda x: (aten.upsample_bilinear2d.default, x, [99, 99], False),
    "padding": lambda x: (aten.reflection_pad2d.default, x, [1, 2, 3, 4]),
    "shuffled pixels": lambda x: (aten.pixel_shuffle.default, x, 2),
    "patches": lambda x: (aten.im2col.default, x, [2, 2], [1, 1], [0, 0], [2, 2]),
}  # fmt: skip


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_a_dry_run_have_the_geometry_of_real_ones(
    name: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    func, *args = LAYERS[name](image().to(memory_format=memory_format))
    expected = looks(func(*args))
    assert looks(result_on_meta(func, tuple(args), {}, fills=False)) == expected
    # Larger ones.
    monkeypatch.setattr(meta_shapes, "_OF_LAYERS_NUMEL", 0)
    assert looks(result_on_meta(func, tuple(args), {}, fills=False)) == expected


def test_a_small_tensor_that_becomes_large_is_not_made() -> None:
    long = torch.empty(10**4, device="meta")
    made = result_on_meta(aten.sub.Tensor, (long[:, None], long[None, :]), {}, fills=False)
    assert looks(made) == looks(torch.empty(10**4, 10**4, device="meta"))


def test_what_torch_refuses_is_refused() -> None:
    real = torch.ones(300, 200)
    for func, args in (
        (aten.add.Tensor, (real, torch.ones(300))),
        (aten.linalg_qr.default, (real, "half")),
        (aten.cat.default, ([real, torch.ones(300, 3, 1)], 1)),
        (aten.convolution.default, (image(3), torch.ones(6, 4, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            func(*args)
        with pytest.raises((RuntimeError, ValueError)):
            result_on_meta(func, args, {}, fills=False)
