"""Writes DTensors of every layout with torch.distributed.checkpoint, and what they are as a whole with `torch.save`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    square = init_device_mesh("cpu", (2, size // 2))
    torch.manual_seed(0)
    whole = {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(5, 7).bfloat16(),
        "middle": torch.randn(3, 6, 4),
        "uneven": torch.randn(size - 1, 3),
        "boxes": torch.randn(6, 10),
        "twice": torch.randn(9, 2),
        "copies": torch.randint(256, (4, 3), dtype=torch.uint8),
        "half copies": torch.randn(8, 3),
        "plain": torch.randn(3),
    }
    layouts = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "middle": (line, [Shard(1)]),
        "uneven": (line, [Shard(0)]),
        "boxes": (square, [Shard(0), Shard(1)]),
        "twice": (square, [Shard(0), Shard(0)]),
        "copies": (line, [Replicate()]),
        "half copies": (square, [Replicate(), Shard(0)]),
    }
    state = {
        key: distribute_tensor(tensor, *layouts[key]) if key in layouts else tensor for key, tensor in whole.items()
    }
    dcp.save({"model": state, "step": 3}, checkpoint_id=folder / "dcp")
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder / "hf"), save_distributed=True))
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
