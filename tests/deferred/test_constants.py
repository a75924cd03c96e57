"""Real tensors that a constructor reads: what they held then is what counts, and a later edit is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nucleate.deferred import deferred
from nucleate.deferred.recording.constants import CLONE_LIMIT_BYTES
from nucleate.errors import DeferredEditError
from nucleate.materialize import materialize

LARGE, SMALL = CLONE_LIMIT_BYTES // 2, 100


def edit_in_place(tensor: Tensor) -> None:
    tensor.add_(1)


def edit_through_data(tensor: Tensor) -> None:
    tensor.data[7] += 1


def edit_a_view(tensor: Tensor) -> None:
    tensor[10:20].zero_()


def load_another(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(torch.ones_like(tensor))


EDITS: list[Callable[[Tensor], None]] = [edit_in_place, edit_through_data, edit_a_view, load_another]


def holding(real: Tensor, compute: Callable[[Tensor], Tensor]) -> nn.Module:
    with deferred():
        model = nn.Module()
        model.weight = nn.Parameter(compute(real))
    return model


def copied(real: Tensor) -> Tensor:
    return torch.empty(real.numel()).copy_(real)


def added(real: Tensor) -> Tensor:
    return torch.randn(real.numel()) + real


@pytest.mark.parametrize("compute", [copied, added])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_large_one_after_the_context_is_refused(
    edit: Callable[[Tensor], None], compute: Callable[[Tensor], Tensor]
) -> None:
    real = torch.rand(LARGE)
    model = holding(real, compute)
    edit(real)
    with pytest.raises(DeferredEditError, match=f"{LARGE}"):
        materialize(model)


@pytest.mark.parametrize("edit", EDITS)
def test_a_small_one_was_copied(edit: Callable[[Tensor], None]) -> None:
    real = torch.rand(SMALL)
    before = real.clone()
    model = holding(real, copied)
    edit(real)
    assert torch.equal(materialize(model).weight, before)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_inside_the_context_comes_too_late_for_what_was_read(edit: Callable[[Tensor], None]) -> None:
    real = torch.rand(LARGE)
    before = real.clone()
    with deferred():
        model = nn.Module()
        model.weight = nn.Parameter(copied(real))
        edit(real)
    assert torch.equal(materialize(model).weight, before)


def test_one_that_nobody_edits_is_taken_as_it_is() -> None:
    real = torch.rand(LARGE, requires_grad=True)
    with torch.inference_mode():
        other = torch.rand(LARGE)
    assert torch.equal(materialize(holding(real.detach(), copied)).weight, real)
    assert torch.equal(materialize(holding(other, copied)).weight, other)
