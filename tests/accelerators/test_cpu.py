"""The CPU as an accelerator."""

import torch
from torch import nn

from nucleate.accelerators import CPUAccelerator
from nucleate.registry import ACCELERATORS


def test_the_registry_knows_it() -> None:
    assert isinstance(ACCELERATORS.create("cpu"), CPUAccelerator)


def test_every_process_gets_the_cpu() -> None:
    cpu = CPUAccelerator()
    assert cpu.is_available()
    assert cpu.count() >= 1
    assert cpu.select(0) == cpu.select(7) == torch.device("cpu")


def test_new_tensors_are_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"), CPUAccelerator().module_init_context():
        assert torch.empty(1).device.type == "cpu"
    with CPUAccelerator().module_init_context():
        assert torch.empty(1).device.type == "cpu"


def test_it_counts_no_device_memory_and_has_no_generator_of_its_own() -> None:
    cpu = CPUAccelerator()
    assert cpu.peak_memory_bytes() is None
    assert cpu.random_state() is None
    model = nn.Linear(1, 1)
    assert cpu.setup(model) is model
