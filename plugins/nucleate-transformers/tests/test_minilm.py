"""A trained model gives the embeddings that transformers gives it; test_ranks.py says so of several ranks."""

from __future__ import annotations

import minilm
import pytest
import torch
import transformers as hf

from nucleate import Runtime
from nucleate_transformers import TransformersIntegration

#: A precision, the dtype of transformers' own that it is compared with, and by how much a cosine may be off.
PRECISIONS = [
    ("32-true", torch.float32, 0.0),
    ("bf16-true", torch.bfloat16, 0.0),
    ("bf16-mixed", torch.float32, 1e-2),
]


@pytest.mark.parametrize(("precision", "dtype", "tolerance"), PRECISIONS)
def test_sentence_embeddings_are_those_of_transformers(precision: str, dtype: torch.dtype, tolerance: float) -> None:
    runtime = Runtime(
        accelerator="cpu", strategy="single_device", precision=precision, plugins=[TransformersIntegration()]
    )
    with runtime.init_module(empty_init=True):
        model = hf.AutoModel.from_pretrained(minilm.folder())
    model = runtime.setup(model).eval()
    mine, theirs = minilm.embed(model), minilm.reference(dtype)
    if tolerance:
        assert (mine * theirs).sum(1).min() > 1 - tolerance
    else:
        assert torch.equal(mine, theirs)
    # It is trained: sentences that mean the same are near each other.
    assert mine[0] @ mine[1] > 0.4 > mine[0] @ mine[2] + 0.1
