"""How others load the checkpoint, each as its own documentation says; of several ways that it shows, the fast one.

Each function imports and launches what it needs and returns what is measured: it constructs the model in bf16, fills
it from the files and returns it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.bench.checkpoint_files import Files
from tests.bench.construct_ways import mesh_of_ranks, shard
from tests.bench.model import default_dtype

#: Constructs a model and fills it from files.
Load = Callable[[Files], nn.Module]


def torch_load() -> Load:
    def load(files: Files) -> nn.Module:
        with default_dtype(torch.bfloat16):
            model = _llama(files)
        model.load_state_dict(torch.load(files.torch_file, weights_only=True))
        return model

    return load


def torch_load_mmap() -> Load:
    def load(files: Files) -> nn.Module:
        model = _on_meta(files)
        model.load_state_dict(torch.load(files.torch_file, mmap=True, weights_only=True), assign=True)
        return model

    return load


def load_file() -> Load:
    from safetensors.torch import load_file

    def load(files: Files) -> nn.Module:
        model = _on_meta(files)
        state: dict[str, torch.Tensor] = {}
        for path in files.shards:
            state |= load_file(path)
        model.load_state_dict(state, assign=True)
        return model

    return load


def safe_open_copy() -> Load:
    from safetensors import safe_open

    @torch.no_grad()
    def load(files: Files) -> nn.Module:
        model = _empty(files)
        parameters = model.state_dict()
        for path in files.shards:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    parameters[key].copy_(file.get_tensor(key))
        return model

    return load


def accelerate_dispatch() -> Load:
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    def load(files: Files) -> nn.Module:
        with default_dtype(torch.bfloat16), init_empty_weights():
            model = _llama(files)
        loaded: nn.Module = load_checkpoint_and_dispatch(
            model, str(files.folder), device_map={"": "cpu"}, dtype=torch.bfloat16
        )
        return loaded

    return load


def accelerate_in_model() -> Load:
    from accelerate import load_checkpoint_in_model

    def load(files: Files) -> nn.Module:
        model = _empty(files)
        load_checkpoint_in_model(model, str(files.folder))
        return model

    return load


def fabric() -> Load:
    return _fabric(devices=1)


def fabric_ranks() -> Load:
    from lightning.fabric.strategies import ModelParallelStrategy  # type: ignore[attr-defined]

    strategy: Any = ModelParallelStrategy(
        lambda model, mesh: shard(model, mesh["data_parallel"]), data_parallel_size=2, tensor_parallel_size=1
    )
    return _fabric(devices=2, strategy=strategy)


def fabric_load_file(assign: bool) -> Callable[[], Load]:
    def prepare() -> Load:
        from lightning.fabric import Fabric
        from safetensors.torch import load_file

        instance = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
        instance.launch()

        def load(files: Files) -> nn.Module:
            with instance.init_module(empty_init=True):
                model = _llama(files)
            state: dict[str, torch.Tensor] = {}
            for path in files.shards:
                state |= load_file(path)
            model.load_state_dict(state, assign=assign)
            return model

        return load

    return prepare


def transformers() -> Load:
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    hide: Any = disable_progress_bar
    hide()

    def load(files: Files) -> nn.Module:
        model: nn.Module = LlamaForCausalLM.from_pretrained(files.folder, dtype=torch.bfloat16, local_files_only=True)
        return model

    return load


def dcp() -> Load:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_state

    def load(files: Files) -> nn.Module:
        model = _empty(files)
        reader = HuggingFaceStorageReader(str(files.folder))
        load_state(model.state_dict(), storage_reader=reader, no_dist=True)
        return model

    return load


def dcp_ranks() -> Load:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as load_state

    mesh = mesh_of_ranks()

    def load(files: Files) -> nn.Module:
        model = _on_meta(files)
        shard(model, mesh)
        model.to_empty(device="cpu")
        reader = HuggingFaceStorageReader(str(files.folder))
        load_state(model.state_dict(), storage_reader=reader)
        return model

    return load


def fastsafetensors() -> Load:
    from fastsafetensors import fastsafe_open

    def load(files: Files) -> nn.Module:
        model = _on_meta(files)
        names = [str(path) for path in files.shards]
        with fastsafe_open(filenames=names, nogds=True, device="cpu") as file:
            # They own their memory: its documentation says that no copy is needed.
            model.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, assign=True)  # noqa: SIM118
        return model

    return load


def runai() -> Load:
    from runai_model_streamer import SafetensorsStreamer

    def load(files: Files) -> nn.Module:
        model = _on_meta(files)
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([str(path) for path in files.shards])
            # So do these.
            model.load_state_dict(dict(streamer.get_tensors()), assign=True)
        return model

    return load


def _fabric(**options: Any) -> Load:
    from lightning.fabric import Fabric

    instance = Fabric(accelerator="cpu", precision="bf16-true", **options)
    instance.launch()

    def load(files: Files) -> nn.Module:
        with instance.init_module(empty_init=True):
            model = _llama(files)
        wrapped = instance.setup(model)
        instance.load_raw(files.torch_file, wrapped)
        module: nn.Module = wrapped.module
        return module

    return load


def _llama(files: Files) -> nn.Module:
    from transformers import LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(files.config())
    return model


def _on_meta(files: Files) -> nn.Module:
    with default_dtype(torch.bfloat16), torch.device("meta"):
        return _llama(files)


def _empty(files: Files) -> nn.Module:
    return _on_meta(files).to_empty(device="cpu")
