"""What converts a tensor in any pieces, and what compares bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from nucleate.deferred.elements import Conversion
from nucleate_bitsandbytes.library import bitsandbytes
from nucleate_bitsandbytes.quantizers import kernels

Convert = Callable[..., list[Tensor]]


@pytest.fixture(scope="session")
def bnb():
    return bitsandbytes()


@pytest.fixture(scope="session")
def convert() -> Convert:
    """Convert a tensor in pieces of so many blocks, or at once."""

    def convert(conversion: Conversion, tensor: Tensor, maker: Sequence[int] = ()) -> list[Tensor]:
        layout = conversion.layout(tuple(tensor.shape), tensor.dtype)
        # Filled with something, so that what nobody writes is seen.
        outs = [torch.full(out.shape, 77, dtype=out.dtype) for out in layout.outputs]
        flat = tensor.reshape(-1)
        num_blocks = -(-flat.numel() // layout.block_numel)
        first, sizes = 0, list(maker)
        while first < num_blocks:
            last = min(num_blocks, first + (sizes.pop(0) if sizes else num_blocks))
            parts = [
                out.view(-1)[slice(*made.range(first, last))] for out, made in zip(outs, layout.outputs, strict=True)
            ]
            conversion.convert(flat[first * layout.block_numel : last * layout.block_numel], parts)
            first = last
        return outs

    return convert


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[Tensor, Tensor], None]:
    def assert_same_bits(ours: Tensor, theirs: Tensor) -> None:
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        ours, theirs = ours.reshape(-1), theirs.reshape(-1)
        if ours.dtype == torch.float32:
            ours, theirs = ours.view(torch.int32), theirs.view(torch.int32)
        differing = (ours != theirs).nonzero().squeeze(1)
        at = differing[:5]
        assert not differing.numel(), f"{differing.numel()} differ, at {at}: {ours[at]} for {theirs[at]}"

    return assert_same_bits


@pytest.fixture(params=["TorchScript", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the loops both ways: as what torch has now, and as what is left when that is gone."""
    kernels.without_lock.cache_clear()
    if request.param == "Python":

        def gone(text: str) -> None:
            raise RuntimeError("there is no TorchScript")

        monkeypatch.setattr(torch.jit, "CompilationUnit", gone)
    yield request.param
    kernels.without_lock.cache_clear()
