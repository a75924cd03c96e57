"""What several ranks wrote, each its own boxes, is read whole by one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nucleate.checkpoint.readers import open_checkpoint
from tests.checkpoint.readers.reading import same_bits, whole
from tests.multi.ranks import fork_ranks


@pytest.mark.parametrize("nproc", [2, 4])
def test_tensors_of_every_layout_are_put_together(tmp_path: Path, nproc: int) -> None:
    (tmp_path / "hf").mkdir()
    fork_ranks(Path(__file__).parent / "scripts" / "dcp_boxes.py", nproc, tmp_path)
    expected = torch.load(tmp_path / "whole.pt", weights_only=True)
    contents = open_checkpoint(tmp_path / "dcp")
    assert contents.skeleton == {"model": dict.fromkeys(expected), "step": 3}
    for key, tensor in expected.items():
        stored = contents.tensors[f"model.{key}"]
        assert same_bits(whole(stored), tensor), key
        for start in range(tensor.numel()):
            out = torch.empty(min(7, tensor.numel() - start), dtype=tensor.dtype)
            stored.read(start, out)
            assert same_bits(out, tensor.flatten()[start : start + 7]), (key, start)
    parts = {
        key: len(contents.tensors[f"model.{key}"].chunks) for key in ("rows", "columns", "boxes", "copies", "plain")
    }
    assert parts == {"rows": nproc, "columns": nproc, "boxes": nproc, "copies": 1, "plain": 1}
    in_shards = open_checkpoint(tmp_path / "hf")
    assert in_shards.format == "safetensors"
    for key, stored in in_shards.tensors.items():
        assert same_bits(whole(stored), expected[key]), key
    assert in_shards.tensors.keys() == expected.keys()
