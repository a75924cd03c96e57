"""Prints what first uses import, as JSON: `python -m tests.first_use plain|transformers|diffusers|timm|ways`.

Each use happens in a process that is forked from one in which torch and the library are imported, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

Use = Callable[[], object]


def main() -> None:
    warnings.simplefilter("ignore")
    group = sys.argv[1]
    with tempfile.TemporaryDirectory() as folder:
        uses = ways(Path(folder)) if group == "ways" else constructions(group)
        # What a library says while it constructs must not get between.
        answer = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        found = {name: {who: imported_by(use) for who, use in both.items()} for name, both in uses.items()}
        answer.write(json.dumps(found))
        answer.close()


def constructions(group: str) -> dict[str, dict[str, Use]]:
    """Return for each model of a group the plain way to it, and ours."""
    return {name: {"plain": make, "ours": lambda make=make: construct(make)} for name, make in models(group).items()}  # type: ignore[misc]


def models(group: str) -> dict[str, Callable[[], nn.Module]]:
    if group == "plain":
        from tests.first_use.plain_models import MODELS

        return MODELS
    from tests.first_use import library_models

    if group == "timm":
        from tests.architectures.stand_ins import make_torchvision_importable

        make_torchvision_importable()
    made: dict[str, Callable[[], nn.Module]] = getattr(library_models, f"{group}_models")()
    return made


def ways(folder: Path) -> dict[str, dict[str, Use]]:
    """Return other ways through a runtime, each with what is done without one."""
    weights = network().state_dict()
    torch.save(weights, folder / "weights.pt")

    def save(path: str) -> None:
        made = runtime()
        made.save(folder / path, made.setup(network()))

    def load(path: str) -> None:
        made = runtime()
        with made.init_module(empty_init=True):
            model = network()
        made.load_raw(folder / path, model)
        made.setup(model)

    def save_and_load_safetensors() -> None:
        save("weights.safetensors")
        load("weights.safetensors")

    def load_plainly() -> None:
        network().load_state_dict(torch.load(folder / "weights.pt", weights_only=True))

    def shard_plainly() -> None:
        from torch.distributed.fsdp import fully_shard

        in_group()
        fully_shard(network())

    def replicate_plainly() -> None:
        in_group()
        nn.parallel.DistributedDataParallel(network())

    return {
        "half precision": {"plain": network, "ours": lambda: construct(network, precision="bf16-true")},
        "mixed precision": {"plain": network, "ours": lambda: construct(network, precision="bf16-mixed")},
        "a training step": {"plain": lambda: train(network()), "ours": lambda: train(construct(network))},
        "save a torch file": {
            "plain": lambda: torch.save(network().state_dict(), folder / "p.pt"),
            "ours": lambda: save("o.pt"),
        },
        "load a torch file": {"plain": load_plainly, "ours": lambda: load("weights.pt")},
        "safetensors": {"plain": load_plainly, "ours": save_and_load_safetensors},
        "fsdp": {"plain": shard_plainly, "ours": lambda: construct(network, strategy="fsdp")},
        "ddp": {"plain": replicate_plainly, "ours": lambda: construct(network, strategy="ddp")},
    }


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200), nn.Linear(200, 300))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step()


def in_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def runtime(**options: Any) -> Any:
    from nucleate import Runtime

    return Runtime(accelerator="cpu", **{"strategy": "single_device", **options})


def construct(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    made = runtime(**options)
    with made.init_module(empty_init=True):
        model = make()
    ready: nn.Module = made.setup(model)
    return ready


def imported_by(use: Use) -> list[str]:
    """Return the names of the modules that a use imports, in a process of its own.

    Raises:
        RuntimeError: The use failed there.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = set(sys.modules)
            use()
            with os.fdopen(writing, "w") as file:
                file.write(json.dumps(sorted(set(sys.modules) - before)))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("a use failed")
    found: list[str] = json.loads(text)
    return found


if __name__ == "__main__":
    main()
