"""Which device a runtime takes, two runtimes in one process, and memory after a failure."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from nucleate import Runtime
from nucleate.errors import ConfigurationError
from tests.gpu.device import DEVICE_TYPE, DeviceMemory, count, device, make_accelerator
from tests.gpu.models import assert_same_values, construct, deferred_by, wholes
from tests.zoo import ZOO

pytestmark = pytest.mark.cuda


def test_auto_takes_the_device() -> None:
    """`Runtime()` without an accelerator takes the GPU."""
    assert Runtime(strategy="single_device").device == device()


def test_an_index_that_does_not_exist_is_refused_with_how_many_there_are() -> None:
    """`CUDAAccelerator(index=99)` is an error that says how many devices there are."""
    with pytest.raises(ConfigurationError, match=rf"99.*\b{count()}\b"):
        Runtime(accelerator=make_accelerator(index=99), strategy="single_device")


@pytest.mark.two_gpus
def test_two_runtimes_on_two_devices_in_one_process_do_not_disturb_each_other() -> None:
    """Each runtime makes, trains and saves the random state on its own GPU."""
    before = torch.accelerator.current_device_index()
    first = Runtime(accelerator=make_accelerator(index=0), strategy="single_device")
    second = Runtime(accelerator=make_accelerator(index=1), strategy="single_device")
    assert (first.device, second.device) == (device(0), device(1))
    models = []
    # Interleaved on purpose.
    for runtime in (first, second):
        models.append(deferred_by(runtime, ZOO["gpt"][0]))
    setups = []
    for runtime, model in zip((second, first), reversed(models), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        setups.append((runtime, model, *runtime.setup(model, optimizer)))
    for runtime, model, wrapped, optimizer in setups:
        eager, _ = construct(ZOO["gpt"][0], on=runtime.device)
        assert {tensor.device for tensor in model.parameters()} == {runtime.device}
        assert_same_values(wholes(model), wholes(eager))
        batch = ZOO["gpt"][1](torch.Generator().manual_seed(1))
        loss = wrapped(runtime.to_device(batch)).square().mean()
        assert loss.device == runtime.device
        runtime.backward(loss)
        optimizer.step()
        assert {state["exp_avg"].device for state in optimizer.state.values()} == {runtime.device}
    torch.accelerator.set_device_index(before)


@pytest.mark.two_gpus
def test_a_model_moves_from_one_device_to_the_other_and_back() -> None:
    """Parameters stay the same objects, with their values and ties, from GPU 0 to GPU 1 and back."""
    before = torch.accelerator.current_device_index()
    model, _ = construct(ZOO["gpt"][0])
    expected = wholes(model)
    objects = [id(parameter) for parameter in model.parameters()]
    for index in (1, 0):
        Runtime(accelerator=make_accelerator(index=index), strategy="single_device").to_device(model)
        assert {parameter.device for parameter in model.parameters()} == {device(index)}
        assert [id(parameter) for parameter in model.parameters()] == objects
        assert_same_values(wholes(model), expected)
    torch.accelerator.set_device_index(before)


def test_a_setup_that_runs_out_of_memory_gives_it_back_and_can_be_repeated() -> None:
    """`setup` fails on a parameter of 4 PiB; afterwards nothing is held, and the rest can be set up."""
    memory = DeviceMemory()

    def attempt(runtime: Runtime) -> nn.Module:
        with runtime.init_module(empty_init=True):
            model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
            model.large = nn.Parameter(torch.ones(2**50))
        with pytest.raises(RuntimeError):
            runtime.setup(model)
        return model

    attempt(Runtime(accelerator=DEVICE_TYPE, strategy="single_device"))
    gc.collect()
    assert memory.held_bytes() <= 2**16
    runtime = Runtime(accelerator=DEVICE_TYPE, strategy="single_device")
    model = attempt(runtime)
    gc.collect()
    # At most what was made before the failure, and no scratch.
    assert memory.held_bytes() <= 64 * 2**20
    del model.large
    runtime.setup(model)
    assert 64 * 2**20 <= memory.held_bytes() <= 64.1 * 2**20
