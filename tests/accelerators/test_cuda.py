"""CUDA as an accelerator, and how it is refused where there is none."""

import pytest
import torch
from torch import nn

from nucleate.accelerators import CUDAAccelerator
from nucleate.errors import ConfigurationError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_is_refused_with_the_reason() -> None:
    assert not CUDAAccelerator().is_available()
    with pytest.raises(ConfigurationError, match=r"accelerator 'cuda' was asked for, but .*use accelerator='cpu'"):
        CUDAAccelerator().select(0)


def test_a_process_without_a_device_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match="local rank 2 has no cuda device: this node has 2"):
        CUDAAccelerator().select(2)


@pytest.mark.cuda
def test_models_and_new_tensors_go_to_the_selected_device() -> None:
    cuda = CUDAAccelerator()
    device = cuda.select(0)
    with cuda.module_init_context():
        assert torch.empty(1).device == device
    model = nn.Linear(2, 2)
    weight = model.weight
    assert cuda.setup(model).weight is weight
    assert weight.device == device
    peak = cuda.peak_memory_bytes()
    assert peak is not None
    assert peak > 0


@pytest.mark.cuda
def test_the_devices_generator_is_saved_and_restored() -> None:
    cuda = CUDAAccelerator()
    device = cuda.select(0)
    state = cuda.random_state()
    first = torch.rand(3, device=device)
    cuda.set_random_state(state)
    assert torch.equal(torch.rand(3, device=device), first)
