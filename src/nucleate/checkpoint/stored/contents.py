"""The contents of a checkpoint of any format, from its headers alone. Every comparison uses them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nucleate.checkpoint.state.tree import KeyPath
from nucleate.checkpoint.stored.tensor import StoredTensor


@dataclass(frozen=True)
class Contents:
    """The contents of one checkpoint, without its tensors.

    Attributes:
        path: The file or folder.
        format: The name of the reader that read it.
        tensors: The tensors by key. Tied tensors may have one key, or several keys for the same bytes.
        skeleton: The saved state, nested as it was, with None in place of each tensor.
        keys: The key in `tensors` of each tensor, by the tensor's place in the skeleton.
        modules: The places where a module was saved, as far as the format contains them.
        sharded: The dims that were spread over ranks at the save, by the key of each sharded tensor.
        is_complete: Whether `save` wrote the checkpoint, so that optimizer states name their parameters.
        notes: Other facts to show, such as the metadata of a safetensors file.
        versions: The versions (`Module._version`) of the modules in each saved module, by place and then by name, as
            far as the file contains them.
    """

    path: Path
    format: str
    tensors: dict[str, StoredTensor]
    skeleton: dict[str, Any]
    keys: dict[KeyPath, str]
    modules: tuple[KeyPath, ...] = ()
    sharded: dict[str, list[int]] = field(default_factory=dict)
    is_complete: bool = False
    notes: dict[str, str] = field(default_factory=dict)
    versions: dict[KeyPath, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def flat(
        cls, path: Path, format: str, tensors: dict[str, StoredTensor], notes: dict[str, str] | None = None
    ) -> Contents:
        """Return the contents of a format that only holds tensors by name."""
        skeleton = dict.fromkeys(tensors)
        return cls(path, format, tensors, skeleton, {(key,): key for key in tensors}, ((),), notes=notes or {})

    @property
    def size_bytes(self) -> int:
        """The size of all tensors together; tensors that share bytes count once."""
        return sum(tensor.size_bytes for tensor in self.distinct())

    def distinct(self) -> list[StoredTensor]:
        """Return the tensors, but only one of each group that shares its bytes."""
        return list({t.identity: t for t in self.tensors.values()}.values())

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
