"""A trained model, quantized while it is read by the ranks that own it.

Arguments: the strategy, a folder with the embeddings that one process made, and the precisions.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers as hf

sys.path.insert(0, str(Path(__file__).parents[1]))

import minilm

from nucleate import Runtime

strategy, expected, precisions = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
for precision in precisions:
    runtime = Runtime(accelerator="cpu", strategy=strategy, precision=precision)
    with runtime.init_module(empty_init=True):
        model = hf.AutoModel.from_pretrained(minilm.folder())
    model = runtime.setup(model).eval()
    wanted = torch.load(expected / f"{precision}.pt", weights_only=True)
    for _ in range(2):
        assert torch.equal(minilm.embed(model), wanted), precision
    print(f"rank {runtime.global_rank}: {precision} exact", flush=True)
