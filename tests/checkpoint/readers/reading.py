"""What the tests of readers share: reading everything, and comparing bits."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.stored.contents import Contents
from nucleate.checkpoint.stored.tensor import StoredTensor


@contextmanager
def as_nobody() -> Iterator[Path]:
    """Yield a folder of a user who may not do everything, as root may, and be that user."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(folder)


def whole(stored: StoredTensor) -> Tensor:
    out = torch.empty(stored.numel, dtype=stored.dtype)
    stored.read(0, out)
    return out.view(stored.shape)


def tensor_at(contents: Contents, *place: Any) -> Tensor:
    return whole(contents.tensors[contents.keys[place]])


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    parts = [
        t.resolve_conj().resolve_neg().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
        for t in (left, right)
    ]
    return torch.equal(*parts)


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """Write a safetensors file with any header at all: JSON, or bytes as they are."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}
