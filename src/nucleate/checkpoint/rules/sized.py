"""Lengths along a dim: the common part of joins and splits of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nucleate.checkpoint.rules.rule import Rule
from nucleate.errors import ConfigurationError, ShapeMismatchError, name_list


@dataclass(frozen=True)
class Sized(Rule):
    """A rule on lengths along a dim: the base of joins and splits."""

    dim: int = 0
    sizes: tuple[int, ...] | None = None
    groups: int = 1

    def check_sizes(self, count: int) -> None:
        if self.sizes is not None and (
            len(self.sizes) != count or not all(type(n) is int and n > 0 for n in self.sizes)
        ):
            raise ConfigurationError(f"{self}: sizes={self.sizes} must be {count} numbers of at least 1.")
        if type(self.groups) is not int or self.groups < 1:
            raise ConfigurationError(f"{self}: groups={self.groups!r} must be a number of at least 1.")

    def place(self, shape: Sequence[int], names: str) -> int:
        dim = self.dim + len(shape) if self.dim < 0 else self.dim
        if not 0 <= dim < len(shape):
            raise ShapeMismatchError(f"{self}: {names} is {tuple(shape)}, which has no dim {self.dim}.")
        return dim

    def joined(self, tensors: list[Tensor], names: Sequence[str]) -> Tensor:
        dim = self.place(tensors[0].shape, names[0])
        for name, tensor in zip(names, tensors, strict=True):
            first = tensors[0]
            one, other = (
                (*each.shape[:dim], *each.shape[dim + 1 :], each.dim(), str(each.dtype)) for each in (first, tensor)
            )
            if one != other:
                raise ShapeMismatchError(
                    f"{self}: {names[0]} is {first.dtype} {tuple(first.shape)} but {name} is {tensor.dtype} "
                    f"{tuple(tensor.shape)}; they must be equal except in dim {self.dim}."
                )
        lengths = [tensor.shape[dim] for tensor in tensors]
        if self.sizes is not None and any(
            length * sum(self.sizes) != size * sum(lengths) for length, size in zip(lengths, self.sizes, strict=True)
        ):
            shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in zip(names, tensors, strict=True)]
            raise ShapeMismatchError(f"{self}: {name_list(shapes)} are not in the ratio of sizes={self.sizes}.")
        if self.groups == 1:
            return torch.cat(tensors, dim)
        self._check_groups(dict(zip(names, lengths, strict=True)))
        parts = [tensor.unflatten(dim, (self.groups, length // self.groups)) for tensor, length in
                 zip(tensors, lengths, strict=True)]  # fmt: skip
        return torch.cat(parts, dim + 1).flatten(dim, dim + 1)

    def parts(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Return the parts of a tensor, with these lengths along the dim."""
        dim = self.dim + tensor.dim() if self.dim < 0 else self.dim
        if self.groups == 1:
            return list(tensor.split(list(lengths), dim))
        grouped = tensor.unflatten(dim, (self.groups, tensor.shape[dim] // self.groups))
        parts = grouped.split([length // self.groups for length in lengths], dim + 1)
        return [part.flatten(dim, dim + 1) for part in parts]

    def lengths(self, tensor: Tensor, name: str, count: int) -> list[int]:
        """Return the length of each of the `count` parts of a tensor."""
        dim = self.place(tensor.shape, name)
        length, sizes = tensor.shape[dim], self.sizes or (1,) * count
        if length % sum(sizes):
            wanted = f"sizes={self.sizes}" if self.sizes else f"{count} equal parts"
            raise ShapeMismatchError(
                f"{self}: {name} is {tuple(tensor.shape)}, and {length} along dim {self.dim} cannot be divided into "
                f"{wanted}."
            )
        lengths = [length // sum(sizes) * size for size in sizes]
        self._check_groups({f"part {number} of {name}": each for number, each in enumerate(lengths)})
        return lengths

    def _check_groups(self, lengths: dict[str, int]) -> None:
        wrong = [f"{name} has {length}" for name, length in lengths.items() if length % self.groups]
        if wrong:
            raise ShapeMismatchError(
                f"{self}: {name_list(wrong)} along dim {self.dim}, which cannot be cut into {self.groups} groups."
            )

    def options(self) -> str:
        sizes = f", sizes={list(self.sizes)}" if self.sizes else ""
        return f", dim={self.dim}{sizes}{f', groups={self.groups}' if self.groups != 1 else ''}"
