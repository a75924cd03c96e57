"""The geometry of results that torch's own meta kernels do not tell."""

from __future__ import annotations

import pytest
import torch

from nucleate.deferred.geometry import result_on_meta


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
