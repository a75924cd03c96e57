"""A small Llama trained by transformers' `Trainer` and under Accelerate, from wherever its weights come."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 96,
}  # fmt: skip
ROWS = [{"input_ids": torch.arange(first, first + 8), "labels": torch.arange(first, first + 8)} for first in range(32)]


def llama() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES))
    return model


def by_trainer(model: nn.Module, folder: Path, between: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
    """Train with transformers' `Trainer`. `between` is called after the trainer is made."""
    arguments = TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer: Any = Trainer(model, arguments, train_dataset=ROWS)
    between()
    trainer.train()
    state: dict[str, Tensor] = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return state


def by_accelerate(model: nn.Module, folder: Path, between: Callable[[], object] = lambda: None) -> dict[str, Tensor]:
    """Train one step under Accelerate. `between` is called after the optimizer is made."""
    accelerator: Any = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    between()
    model, optimizer = accelerator.prepare(model, optimizer)
    row = ROWS[accelerator.process_index]
    accelerator.backward(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss)
    optimizer.step()
    state: dict[str, Tensor] = accelerator.unwrap_model(model).state_dict()
    return state


def assert_same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
