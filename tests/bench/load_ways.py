"""The ways to load a checkpoint: nucleate's, and those of `load_peers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.bench import load_peers as peers
from tests.bench.checkpoint_files import Files
from tests.bench.load_peers import Load


@dataclass(frozen=True)
class Way:
    """One way to come from files to a model.

    Attributes:
        label: What the table calls it.
        prepare: Imports and launches what it needs; that is not measured. Returns what is.
        ranks: On how many processes.
        ours: Its weights must be those of the files.
        torch_file: It reads the `.pt` file, not the shards of safetensors.
        maps: It maps files, so that its anonymous memory has to be sampled.
        frozen: Its weights stay where the files are and are not to be changed.
    """

    label: str
    prepare: Callable[[], Load]
    ranks: int = 1
    ours: bool = False
    torch_file: bool = False
    maps: bool = False
    frozen: bool = False


def nucleate(strategy: str, **options: Any) -> Callable[[], Load]:
    def prepare() -> Load:
        from transformers import LlamaForCausalLM

        from nucleate import Runtime

        runtime: Any = Runtime(accelerator="cpu", strategy=strategy, precision="bf16-true")
        runtime.launch()

        def load(files: Files) -> nn.Module:
            with runtime.init_module(empty_init=True):
                model: Any = LlamaForCausalLM(files.config())
            runtime.load_raw(files.folder, model, **options)
            runtime.setup(model)
            loaded: nn.Module = model
            return loaded

        return load

    return prepare


def nucleate_state_dict(strategy: str) -> Callable[[], Load]:
    def prepare() -> Load:
        from safetensors.torch import load_file
        from transformers import LlamaForCausalLM

        from nucleate import Runtime

        runtime: Any = Runtime(accelerator="cpu", strategy=strategy, precision="bf16-true")
        runtime.launch()

        def load(files: Files) -> nn.Module:
            with runtime.init_module(empty_init=True):
                model: Any = LlamaForCausalLM(files.config())
            state = {name: tensor for shard in files.shards for name, tensor in load_file(shard).items()}
            model.load_state_dict(state)
            del state
            runtime.setup(model)
            loaded: nn.Module = model
            return loaded

        return load

    return prepare


WAYS = {
    "nucleate": Way("nucleate `load_raw`", nucleate("single_device"), ours=True),
    "nucleate-mmap": Way(
        "nucleate `load_raw(mmap=True)`: frozen",
        nucleate("single_device", mmap=True),
        ours=True,
        maps=True,
        frozen=True,
    ),
    "nucleate-state-dict": Way(
        "nucleate, safetensors `load_file`, `load_state_dict` before `setup`",
        nucleate_state_dict("single_device"),
        ours=True,
        maps=True,
    ),
    "transformers": Way("transformers `from_pretrained`", peers.transformers, maps=True),
    "torch-mmap": Way(
        "meta, `torch.load(mmap=True)`, `load_state_dict(assign=True)`",
        peers.torch_load_mmap,
        torch_file=True,
        maps=True,
    ),
    "load-file": Way("meta, safetensors `load_file`, `load_state_dict(assign=True)`", peers.load_file, maps=True),
    "safe-open": Way("meta, `to_empty`, safetensors `safe_open`, `copy_`", peers.safe_open_copy, maps=True),
    "dcp": Way("meta, `to_empty`, DCP `HuggingFaceStorageReader`", peers.dcp, maps=True),
    "runai": Way("meta, runai-model-streamer, `load_state_dict(assign=True)`", peers.runai, maps=True),
    "fastsafetensors": Way("meta, fastsafetensors, `load_state_dict(assign=True)`", peers.fastsafetensors, maps=True),
    "accelerate": Way(
        "Accelerate `init_empty_weights`, `load_checkpoint_and_dispatch`", peers.accelerate_dispatch, maps=True
    ),
    "accelerate-in-model": Way(
        "meta, `to_empty`, Accelerate `load_checkpoint_in_model`", peers.accelerate_in_model, maps=True
    ),
    "fabric-load-file": Way(
        "Fabric `init_module(empty_init=True)`, safetensors `load_file`, `load_state_dict`",
        peers.fabric_load_file(assign=False),
        maps=True,
    ),
    "fabric-load-file-assign": Way(
        "Fabric `init_module(empty_init=True)`, safetensors `load_file`, `load_state_dict(assign=True)`",
        peers.fabric_load_file(assign=True),
        maps=True,
    ),
    "fabric": Way("Fabric `init_module(empty_init=True)`, `load_raw`", peers.fabric, torch_file=True, maps=True),
    "torch-load": Way("eager, `torch.load`, `load_state_dict`", peers.torch_load, torch_file=True, maps=True),
    "nucleate-fsdp": Way("nucleate `fsdp`, `load_raw`", nucleate("fsdp"), ranks=2, ours=True),
    "nucleate-state-dict-fsdp": Way(
        "nucleate `fsdp`, `load_file`, `load_state_dict` before `setup`",
        nucleate_state_dict("fsdp"),
        ranks=2,
        ours=True,
        maps=True,
    ),
    "dcp-ranks": Way(
        "meta, `fully_shard`, `to_empty`, DCP `HuggingFaceStorageReader`", peers.dcp_ranks, ranks=2, maps=True
    ),
    "fabric-ranks": Way(
        "Fabric `ModelParallelStrategy`, `load_raw`", peers.fabric_ranks, ranks=2, torch_file=True, maps=True
    ),
}
