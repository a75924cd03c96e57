"""What a checkpoint holds, read from its headers: every comparison is made with this, before a tensor is read.

This file decides the format around DCP's: the marker with its version, and the one tensor with all values and
the place of each tensor. How tensors are stored is `dcp`'s business.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nucleate.checkpoint.folder import MARKER
from nucleate.checkpoint.tree import KeyPath
from nucleate.checkpoint.values import decode, encode
from nucleate.errors import CheckpointError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

FORMAT_VERSION = 1
#: The key of the tensor that holds everything else.
VALUES = "nucleate.values"


@dataclass(frozen=True)
class Index:
    """The contents of one checkpoint, without its tensors.

    Attributes:
        folder: Where it is.
        metadata: DCP's headers.
        skeleton: The saved state with None where tensors stood.
        keys: The place of each tensor to the key that it is stored under; tied tensors share one.
        sharded: The key of each tensor that was sharded to the dims that were spread over ranks.
    """

    folder: Path
    metadata: Metadata
    skeleton: dict[str, Any]
    keys: dict[KeyPath, str]
    sharded: dict[str, list[int]]

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read the index of the checkpoint in `folder`, on this rank alone.

        Raises:
            CheckpointError: It is damaged, or of a newer version than this nucleate reads.
        """
        from nucleate.checkpoint import dcp

        _check_marker(folder)
        metadata = dcp.headers(folder)
        if VALUES not in metadata.state_dict_metadata:
            raise CheckpointError(f"the checkpoint at {folder} is damaged: it has no {VALUES}.")
        data = torch.empty(metadata.state_dict_metadata[VALUES].size, dtype=torch.uint8)  # type: ignore[union-attr]
        dcp.read({VALUES: data}, folder, metadata, distributed=False)
        values = decode(data)
        index = cls(folder, metadata, values["skeleton"], values["keys"], values["sharded"])
        lost = set(index.keys.values()) - metadata.state_dict_metadata.keys()
        if lost:
            raise CheckpointError(f"the checkpoint at {folder} is damaged: its index lacks {sorted(lost)[0]!r}.")
        return index

    def has(self, path: KeyPath) -> bool:
        """Return whether anything was saved at `path`."""
        node: Any = self.skeleton
        for part in path:
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True

    def at(self, path: KeyPath) -> Any:
        """Return the part of the skeleton at `path`, which must be there."""
        node: Any = self.skeleton
        for part in path:
            node = node[part]
        return node

    def shape(self, key: str) -> torch.Size:
        """Return the whole shape of the tensor stored under `key`."""
        size: torch.Size = self.metadata.state_dict_metadata[key].size  # type: ignore[union-attr]
        return size

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of the tensor stored under `key`."""
        dtype: torch.dtype = self.metadata.state_dict_metadata[key].properties.dtype  # type: ignore[union-attr]
        return dtype


def pack(skeleton: dict[str, Any], keys: dict[KeyPath, str], sharded: dict[str, list[int]]) -> Tensor:
    """Return the tensor to store under `VALUES`, from which `Index.read` gets all three back.

    Raises:
        CheckpointError: A value in the skeleton cannot be saved; the message names it.
    """
    encode(skeleton)  # first by itself, so that a message names the place in the user's state
    return encode({"skeleton": skeleton, "keys": keys, "sharded": sharded})


def write_marker(folder: Path, world_size: int) -> None:
    """Write the file that says what the folder is, and put it on disk."""
    marker = {
        "format": "nucleate checkpoint",
        "version": FORMAT_VERSION,
        "torch": torch.__version__,
        "world_size": world_size,
    }
    with open(folder / MARKER, "w", encoding="utf-8") as file:
        file.write(json.dumps(marker, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _check_marker(folder: Path) -> None:
    try:
        version = json.loads((folder / MARKER).read_text(encoding="utf-8"))["version"]
        newer = version > FORMAT_VERSION
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / MARKER} cannot be read: {type(error).__name__}: {error}") from error
    if newer:
        raise CheckpointError(
            f"the checkpoint at {folder} has format version {version}, but this nucleate reads versions up to "
            f"{FORMAT_VERSION}. Upgrade nucleate."
        )
