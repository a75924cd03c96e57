"""What a checkpoint of any format holds, from its headers alone: every comparison is made with this."""

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
        tensors: The key of each tensor to the tensor. Tied tensors may have one key, or several for the same bytes.
        skeleton: What is saved, nested as it was, with None where a tensor stands.
        keys: The place of each tensor in the skeleton to its key in `tensors`.
        modules: The places where a module was saved, as far as the format tells.
        sharded: The key of each tensor that was sharded when it was saved to the dims that were spread over ranks.
        is_complete: Whether `save` wrote it, so that optimizers go by the names of their parameters.
        notes: What else is worth showing, such as the metadata of a safetensors file.
        versions: The place of a module to the versions (`Module._version`) of the modules in it, by name, as far as
            the file tells.
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
        """Return the contents of a format that knows tensors by name and nothing else."""
        skeleton = dict.fromkeys(tensors)
        return cls(path, format, tensors, skeleton, {(key,): key for key in tensors}, ((),), notes=notes or {})

    @property
    def size_bytes(self) -> int:
        """How large all tensors are together, those that share bytes once."""
        return sum(tensor.size_bytes for tensor in self.distinct())

    def distinct(self) -> list[StoredTensor]:
        """Return the tensors, one for each group that shares its bytes."""
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
