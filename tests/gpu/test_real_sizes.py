"""LLaMAs of 1 and 7 billion parameters in bfloat16: made, loaded and generated from, in a stated amount of memory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tests.zoo  # noqa: F401  # It puts the examples on the path.
from nucleate import Runtime
from nucleate.devices.staging import BUFFER_BYTES
from nucleate.precision.casting import default_dtype
from tests.gpu.device import DEVICE_TYPE, DeviceMemory, device, free_bytes, only_on_gpu

from llama import SIZES, Cache, Llama, LlamaConfig, generate  # isort: skip

pytestmark = pytest.mark.cuda

each_size = pytest.mark.parametrize(
    "size", ["tiny", *(pytest.param(size, marks=only_on_gpu("sizes")) for size in ("1B", "7B"))]
)
MIB = 2**20


def numel_of(config: LlamaConfig) -> tuple[int, int]:
    """Return how many elements the model and its largest parameter have."""
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in Llama(config).parameters()]
    return sum(sizes), max(sizes)


def need_memory(size_bytes: int) -> None:
    """Skip the test where the device has less memory."""
    if (free := free_bytes()) < size_bytes:
        pytest.skip(f"needs {size_bytes / 2**30:.1f} GiB of device memory, {free / 2**30:.1f} are free")


def runtime() -> Runtime:
    return Runtime(accelerator=DEVICE_TYPE, strategy="single_device", precision="bf16-true")


def timed(function: Callable[[], Any]) -> float:
    torch.accelerator.synchronize(device())
    started = time.perf_counter()
    function()
    torch.accelerator.synchronize(device())
    return time.perf_counter() - started


def check_memory(memory: DeviceMemory, final_bytes: int, transient_bytes: int) -> None:
    """Assert that tensors took the final bytes and one transient, and torch's allocator 5% more than they."""
    slack = 2 * MIB
    assert final_bytes <= memory.held_bytes() <= final_bytes * 1.001 + slack
    assert memory.peak_bytes() <= final_bytes * 1.001 + transient_bytes + slack
    # Blocks are multiples of 2 MiB, and small tensors share blocks of 2 or 20 MiB.
    assert memory.peak_reserved_bytes() <= final_bytes * 1.05 + transient_bytes + 64 * MIB


def tokens_of(model: nn.Module, config: LlamaConfig) -> list[int]:
    """Return the first tokens that a model generates."""
    prompt = torch.arange(8, device=device())[None]
    steps = generate(model.eval(), prompt, Cache(config, 24, device(), torch.bfloat16))
    return [int(token) for token in islice(steps, 8)]


def written(folder: Path, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Write a folder of safetensors files as Hugging Face knows it, and yield what is in it, a file at a time."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Llama(config).state_dict().items()}
    parts: dict[str, list[str]] = {}
    for name in shapes:
        layer = ".".join(name.split(".")[:3]) if ".layers." in name else "rest"
        parts.setdefault(layer, []).append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(parts.values()):
        tensors = {name: values(name, shapes[name]) for name in names}
        file = f"model-{number:05}.safetensors"
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(names, file))
        yield from tensors.items()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def values(name: str, shape: torch.Size) -> Tensor:
    """Return the values of one tensor, made on the device, where it is fast; the same for each call."""
    generator = torch.Generator(device()).manual_seed(sum(name.encode()) * 7919 + len(name))
    return torch.empty(shape, dtype=torch.bfloat16, device=device()).normal_(0, 0.02, generator=generator)


@each_size
def test_a_model_is_made_in_its_own_bytes_and_one_parameter(size: str, record_property: Any) -> None:
    """A model is made on the device: the peak is the model and its largest parameter, and its bits are eager's."""
    config = SIZES[size]
    numel, largest = numel_of(config)
    need_memory(2 * (numel + largest) + 2**30)
    torch.manual_seed(0)
    with runtime().init_module(empty_init=True):
        model: nn.Module = Llama(config)
    memory = DeviceMemory()
    record_property("seconds", round(timed(lambda: runtime().setup(model)), 2))
    check_memory(memory, 2 * numel, 2 * largest)
    record_property("peak, MiB", memory.peak_bytes() // MIB)
    record_property("reserved, MiB", memory.peak_reserved_bytes() // MIB)
    assert len(tokens_of(model, config)) == 8
    # A few of its parameters, so that two models need not fit: in the order of the constructor, from the same seed.
    if free_bytes() > 2 * numel + 2**30:
        torch.manual_seed(0)
        with default_dtype(torch.bfloat16), device():
            eager = Llama(config)
        for (name, ours), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert torch.equal(ours, theirs), name


@each_size
def test_a_model_is_loaded_in_its_own_bytes_and_one_buffer(size: str, tmp_path: Path, record_property: Any) -> None:
    """A model is loaded from files to the device: the peak is the model and a staging buffer; every bit arrives."""
    config = SIZES[size]
    numel, largest = numel_of(config)
    need_memory(2 * (numel + largest) + 2**30)
    if (free := shutil.disk_usage(tmp_path).free) < 2 * numel + 2**30:
        pytest.skip(f"needs {2 * numel / 2**30 + 1:.1f} GiB of disk in {tmp_path}, {free / 2**30:.1f} are free")
    try:
        record_property("writing, seconds", round(timed(lambda: [None for _ in written(tmp_path, config)]), 2))
        with runtime().init_module(empty_init=True):
            model = Llama(config)
        memory = DeviceMemory()

        def load() -> None:
            runtime().load_raw(tmp_path, model)
            runtime().setup(model)

        record_property("seconds", round(timed(load), 2))
        check_memory(memory, 2 * numel, 2 * BUFFER_BYTES)
        record_property("peak, MiB", memory.peak_bytes() // MIB)
        record_property("reserved, MiB", memory.peak_reserved_bytes() // MIB)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, values(name, tensor.shape)), name
        tokens = tokens_of(model, config)
        assert len(tokens) == 8
        assert tokens_of(model, config) == tokens
    finally:
        # pytest keeps the folders of three runs.
        shutil.rmtree(tmp_path)
