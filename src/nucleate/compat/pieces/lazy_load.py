"""Torch files whose tensors are read when they are used."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch


class NotYetLoadedTensor:
    """The class that scripts compare tensors of `lazy_load` with. No tensor of nucleate is one: files are mapped."""


def lazy_load(filename: str | PathLike[str]) -> Any:
    """Open a torch file whose tensors are mapped: the system reads a page of the file when it is first used.

    Args:
        filename: The file, as `torch.save` writes it.
    """
    return torch.load(filename, mmap=True, map_location="cpu", weights_only=True)
