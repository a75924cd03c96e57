"""A quantized model on several ranks is that of one process: values, outputs, training, checkpoints.

Arguments: the strategy, a folder with what one process made, and the modes to try.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from quantized_model import TOKENS, Model, history, whole

from nucleate import Runtime, Strategy
from nucleate.checkpoint.stored import DataFile
from nucleate.strategies import DDPStrategy, FSDPStrategy

STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "fsdp, gathered until backward": lambda: FSDPStrategy(reshard_after_forward=False),
}
read_bytes = 0
real_read = DataFile.read_into


def counted(self: DataFile, address: int, size_bytes: int, offset: int) -> None:
    global read_bytes
    read_bytes += size_bytes
    real_read(self, address, size_bytes, offset)


DataFile.read_into = counted  # type: ignore[method-assign]


def build(runtime: Runtime, seed: int) -> Model:
    torch.manual_seed(seed + runtime.global_rank)
    with runtime.init_module(empty_init=True):
        return Model()


def main() -> None:
    global read_bytes
    name, folder, modes = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    for mode in modes:
        strategy: Strategy = STRATEGIES[name]()
        runtime = Runtime(accelerator="cpu", strategy=strategy, precision=f"bnb-{mode}")
        expected = torch.load(folder / f"{mode}.pt", weights_only=True)

        def assert_equal(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
            assert found.keys() == wanted.keys(), (what, found.keys() ^ wanted.keys())
            for key, tensor in whole(found).items():
                assert torch.equal(tensor, wanted[key]), f"{what}: {key} differs"

        # From its recipe, with seeds that differ on the ranks.
        model = runtime.setup(build(runtime, 3))
        assert_equal(model.state_dict(), expected["from recipe"], "from recipe")
        # From a file: each rank reads what it owns.
        model = build(runtime, 4)
        runtime.load_raw(folder / "full.safetensors", model)
        read_bytes = 0
        model = runtime.setup(model)
        assert_equal(model.state_dict(), expected["from file"], "from file")
        size_bytes = expected["size_bytes"]
        # Doubly quantized scales need the mean of all scales, so every rank reads all of these weights.
        reads_part = runtime.strategy.shards and not mode.endswith("-dq")
        allowed = size_bytes / runtime.world_size * 1.05 + 20_000 if reads_part else size_bytes
        assert read_bytes <= allowed, f"read {read_bytes} of {size_bytes} bytes"
        # Used, trained, used again.
        for number, (found, wanted) in enumerate(zip(history(runtime, model), expected["history"], strict=True)):
            assert torch.equal(found, wanted), f"output {number} differs by {(found - wanted).abs().max()}"
        assert_equal(model.state_dict(), expected["trained"], "trained")
        # Saved by all, loaded by all: into a deferred model and into one that was used.
        for format in ("dcp", "safetensors"):
            path = folder / f"{name} {mode} {format}"
            runtime.save(path, {"model": model}, format=format)
            again = build(runtime, 5)
            runtime.load_raw(path, again)
            again = runtime.setup(again)
            assert_equal(again.state_dict(), expected["trained"], f"{format}, deferred")
            used = runtime.setup(build(runtime, 6))
            with torch.no_grad():
                used.eval()(TOKENS)
            runtime.load(path, {"model": used})
            assert_equal(used.state_dict(), expected["trained"], f"{format}, used")
            with torch.no_grad():
                assert torch.equal(used.eval()(TOKENS), expected["history"][-1])
        # A full-precision file into quantized layers.
        runtime.load_raw(folder / "full.safetensors", used)
        assert_equal(used.state_dict(), expected["from file"], "full weights into a model that is set up")
        print(f"rank {runtime.global_rank}: {mode} exact, read {read_bytes} of {size_bytes}", flush=True)


if __name__ == "__main__":
    main()
