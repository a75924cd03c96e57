"""What survives a move to another device. Without one, a copy on the CPU stands in for it."""

import pytest
import torch
from torch import Tensor, nn

from nucleate.accelerators.placement import place, transfer

META = torch.device("meta")


def copied(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    transfer(tensors, torch.clone)
    return tensors


def test_parameters_and_buffers_stay_the_same_objects_with_the_same_values() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    before = [(tensor, tensor.data_ptr(), tensor.clone()) for tensor in [*model.parameters(), *model.buffers()]]
    copied(model)
    after = [*model.parameters(), *model.buffers()]
    for (tensor, pointer, value), moved in zip(before, after, strict=True):
        assert moved is tensor
        assert moved.data_ptr() != pointer
        assert torch.equal(moved, value)
    assert model[2].weight is model[0].weight


def test_tensors_that_share_a_storage_still_share_one() -> None:
    model = nn.Module()
    whole = torch.arange(12.0).view(3, 4)
    model.whole = nn.Parameter(whole)
    model.transposed = nn.Parameter(whole.t())
    model.register_buffer("row", whole[1])
    tensors = copied(model)
    assert len({tensor.untyped_storage()._cdata for tensor in tensors}) == 1
    with torch.no_grad():
        model.transposed[2, 1] = 99
    assert model.whole[1].tolist() == model.row.tolist() == [4, 5, 99, 7]
    assert whole[1].tolist() == [4, 5, 6, 7]


def test_gradients_move_along() -> None:
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad
    copied(model)
    assert gradient is not None
    assert model.weight.grad is not gradient
    assert torch.equal(model.weight.grad, gradient)  # type: ignore[arg-type]


def test_what_is_there_already_or_on_meta_is_left_alone() -> None:
    with META:
        model = nn.Linear(2, 2)
    place(model, torch.device("cpu"))
    assert model.weight.device == META
    real = nn.Linear(2, 2)
    pointer = real.weight.data_ptr()
    place(real, torch.device("cpu"))
    assert real.weight.data_ptr() == pointer


@pytest.mark.cuda
def test_an_lstm_moved_to_cuda_computes_the_same() -> None:
    lstm = nn.LSTM(3, 4)
    data = torch.randn(2, 1, 3)
    expected = lstm(data)[0]
    place(lstm, torch.device("cuda", 0))
    torch.testing.assert_close(lstm(data.cuda())[0].cpu(), expected, rtol=1e-4, atol=1e-5)
