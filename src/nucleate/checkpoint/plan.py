"""What a load will do, worked out before it does anything: which tensors to fill, and everything that does not fit.

This file decides what fits: shapes must be equal, floating point dtypes may differ (the value is cast). What each
kind of entry wants is for the loader.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nucleate.checkpoint.index import Index
from nucleate.checkpoint.tree import KeyPath, join, key_of
from nucleate.errors import CheckpointError, CheckpointKeyError, ShapeMismatchError, name_list


@dataclass
class Plan:
    """A load, before a byte is changed.

    Attributes:
        index: What the checkpoint holds.
        passes: Key to tensor to fill; more than one pass where two tensors want the same key.
        finish: What to call when the tensors are filled, with what it is called in messages.
        missing: What was asked for and is not in the checkpoint.
        unexpected: What is in the checkpoint, inside something asked for, and has no place there.
        leftover: Where the things are that `unexpected` names.
        mismatched: What is in both and is of another kind, as sentences.
        wrong_shapes: What is in both and has another shape, as sentences.
    """

    index: Index
    passes: list[dict[str, Tensor]] = field(default_factory=list)
    finish: list[tuple[str, Callable[[], object]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    leftover: list[KeyPath] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    wrong_shapes: list[str] = field(default_factory=list)

    def fill(self, path: KeyPath, target: Tensor) -> None:
        """Read the tensor saved at `path` into `target`, or note that it does not fit.

        Args:
            path: A place at which a tensor was saved.
            target: A tensor with memory; it is detached and written in place.
        """
        key = self.index.keys[path]
        shape, dtype = self.index.shape(key), self.index.dtype(key)
        if shape != target.shape:
            self.wrong_shapes.append(
                f"{key_of(path)} is {tuple(target.shape)} here but {tuple(shape)} in the checkpoint"
            )
        elif dtype != target.dtype and not (dtype.is_floating_point and target.dtype.is_floating_point):
            self.mismatched.append(f"{key_of(path)} is {target.dtype} here but {dtype} in the checkpoint")
        else:
            self._read(key, target.detach())

    def tree(self, path: KeyPath, target: Callable[[KeyPath, torch.Size, torch.dtype], Tensor] | None = None) -> Any:
        """Return what was saved at `path`, with tensors that are filled when the plan is executed.

        Args:
            path: A place at which something was saved.
            target: Returns a tensor to fill for a place, a shape and a dtype; without it they are new, on the CPU.
        """
        new: dict[str, Tensor] = {}

        def tensor_at(place: KeyPath) -> Tensor | None:
            key = self.index.keys.get(place)
            if key is None:
                return None
            shape, dtype = self.index.shape(key), self.index.dtype(key)
            if target is None:
                if key not in new:
                    new[key] = torch.zeros(shape, dtype=dtype)
                    self._read(key, new[key])
                return new[key]
            tensor = target(place, shape, dtype)
            self._read(key, tensor)
            return tensor

        return join(self.index.at(path), path, tensor_at)

    def _read(self, key: str, target: Tensor) -> None:
        for targets in self.passes:
            if key not in targets:
                targets[key] = target
                return
        self.passes.append({key: target})

    def check(self, strict: bool) -> None:
        """Raise if the checkpoint and what it is loaded into do not fit together.

        Args:
            strict: Also refuse missing and unexpected keys.

        Raises:
            CheckpointKeyError: Keys are missing or unexpected.
            ShapeMismatchError: Tensors have other shapes.
            CheckpointError: Something else is not what it was.
        """
        problems = {
            "missing in the checkpoint": self.missing if strict else [],
            "unexpected in the checkpoint": self.unexpected if strict else [],
            "of another shape": self.wrong_shapes,
            "of another kind": self.mismatched,
        }
        lines = [f"  {len(found)} {what}: {name_list(found)}" for what, found in problems.items() if found]
        if not lines:
            return
        advice = "Nothing was changed."
        if not (self.wrong_shapes or self.mismatched):
            advice += " Pass strict=False to load only what is in both."
        message = "\n".join([f"the checkpoint at {self.index.folder} does not fit:", *lines, advice])
        if strict and (self.missing or self.unexpected):
            raise CheckpointKeyError(message)
        if self.wrong_shapes:
            raise ShapeMismatchError(message)
        raise CheckpointError(message)
