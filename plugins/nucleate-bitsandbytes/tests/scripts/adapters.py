"""Adapters train on several ranks as in one process, beside a base that is quantized while it is read, or was before.

Arguments: the strategy, a folder with what one process made, and the modes to try.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from adapted_model import ADAPTERS, Model, adapted, train
from quantized_model import whole

from nucleate import Runtime


def main() -> None:
    strategy, folder, modes = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    for mode in modes:
        expected = torch.load(folder / f"{mode}.pt", weights_only=True)
        for path in (folder / "full.safetensors", folder / f"{mode}.safetensors"):
            if not path.exists():
                continue
            runtime = Runtime(accelerator="cpu", strategy=strategy, precision=f"bnb-{mode}")
            torch.manual_seed(6 + runtime.global_rank)
            with runtime.init_module(empty_init=True):
                model = Model().requires_grad_(False)
            runtime.load_raw(path, model)
            with runtime.init_module(empty_init=True):
                model = adapted(model)
            model = runtime.setup(model)
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            assert set(trained) == ADAPTERS
            assert {parameter.dtype for parameter in trained.values()} == {torch.bfloat16}
            losses = train(runtime, model)
            torch.testing.assert_close(losses, expected["losses"], rtol=0.05, atol=0.02)
            for name, tensor in whole({name: p.detach() for name, p in trained.items()}).items():
                torch.testing.assert_close(tensor, expected["trained"][name], rtol=0.1, atol=0.02)
        print(f"rank {runtime.global_rank}: {mode} trains", flush=True)


if __name__ == "__main__":
    main()
