"""Deferred tensors that stand for the tensors in checkpoint files: each is bound to its bytes without reading them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint import open_checkpoint
from nucleate.deferred import bind
from nucleate.errors import CheckpointKeyError, name_list


class Binding:
    """The tensors of some checkpoint files.

    Args:
        files: Paths of safetensors or torch files. If several files have a key, the last one counts.
        metadata: The content of an index of the files, or None without an index.
        device: The device of the deferred tensors.

    Attributes:
        stored: The element sources by key.

    Raises:
        CheckpointNotFoundError: A file does not exist.
        CheckpointError: A file is damaged.
        CheckpointKeyError: The index names tensors that its files do not have.
    """

    def __init__(self, files: Sequence[str], metadata: Mapping[str, Any] | None, device: torch.device) -> None:
        self._device = device
        self.stored = {}
        for file in files:
            contents = open_checkpoint(file)
            self.stored.update({".".join(map(str, path)): contents.tensors[key] for path, key in contents.keys.items()})
        listed = (metadata or {}).get("weight_map", {})
        absent = {key: file for key, file in listed.items() if key not in self.stored}
        if absent:
            raise CheckpointKeyError(
                f"the index of {files[0]} lists tensors that are not in their files: "
                f"{name_list(f'{key} ({file})' for key, file in absent.items())}. Copy the checkpoint again."
            )

    def tensors(self, besides: Collection[str] = ()) -> dict[str, Tensor]:
        """Return a deferred tensor for each key. Keys for the same bytes share one tensor.

        Args:
            besides: Keys to leave out.
        """
        made: dict[Any, Tensor] = {}
        wanted = {key: stored for key, stored in self.stored.items() if key not in besides}
        for stored in wanted.values():
            place = (stored.dtype, stored.shape, stored.chunks)
            if place not in made:
                made[place] = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
                if stored.numel:
                    bind(made[place], stored)
        return {key: made[(stored.dtype, stored.shape, stored.chunks)] for key, stored in wanted.items()}
