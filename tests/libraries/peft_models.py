"""A Llama of transformers with adapters of PEFT, and its training; run as a module, it trains on several ranks.

Arguments: the strategy, a folder with what one process made, and the precisions to try.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nucleate import Runtime

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, get_peft_model

CONFIG = LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=96)
TOKENS = torch.arange(64).view(4, 16)
LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def build(runtime: Runtime, path: Path | None, **lora: Any) -> nn.Module:
    """Construct a deferred model, load a checkpoint of plain or of quantized weights, and add adapters."""
    torch.manual_seed(6 + runtime.global_rank)
    with runtime.init_module(empty_init=True):
        model: Any = LlamaForCausalLM(CONFIG)
    if path is not None:
        runtime.load_raw(path, model)
    with runtime.init_module(empty_init=True), warnings.catch_warnings():
        # PEFT asks transformers for a property that has a newer name.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(**{**LORA, **lora}))  # type: ignore[no-any-return]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(runtime: Any, model: Any, num_steps: int = 8) -> list[float]:
    optimizer = runtime.setup_optimizers(torch.optim.AdamW(trained(model).values(), lr=1e-2))
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        runtime.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def main() -> None:
    strategy, folder, precisions = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    for precision in precisions:
        expected = torch.load(folder / f"{precision}.pt", weights_only=True)
        for name in ("full", precision):
            runtime = Runtime(accelerator="cpu", strategy=strategy, precision=precision)
            model = build(runtime, folder / f"{name}.safetensors")
            asked = set(trained(model))
            model = runtime.setup(model)
            assert set(trained(model)) == asked
            torch.testing.assert_close(train(runtime, model), expected["losses"], rtol=0.05, atol=0.02)
            for key, parameter in trained(model).items():
                assert parameter.dtype == torch.bfloat16, key
                torch.testing.assert_close(whole(parameter), expected["trained"][key], rtol=0.1, atol=0.02)
        print(f"rank {runtime.global_rank}: {precision} trains", flush=True)


if __name__ == "__main__":
    main()
