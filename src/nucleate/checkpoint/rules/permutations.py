"""Rules that make one tensor from one tensor: they swap its dims, or reorder its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nucleate.checkpoint.rules.pattern import Pattern, check_new_name, new_name
from nucleate.checkpoint.rules.rule import Backward, Forward, Move, Rule
from nucleate.errors import ConfigurationError, ShapeMismatchError


@dataclass(frozen=True)
class OneToOne(Rule):
    """A rule that makes one tensor from one tensor."""

    pattern: Pattern
    new: str | None

    def __post_init__(self) -> None:
        if self.new is not None:
            check_new_name(self.new, (self.pattern,))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def _forward(self, name: str) -> Forward:
        raise NotImplementedError

    def _backward(self, name: str) -> Backward:
        raise NotImplementedError

    def moves(self, names: Sequence[str]) -> list[Move]:
        found = [(name, captures) for name in names if (captures := self.pattern.match(name)) is not None]
        return [
            Move(
                (name,),
                (name if self.new is None else new_name(self.new, captures, self.pattern),),
                self._forward(name),
                self._backward(name),
            )
            for name, captures in found
        ]

    def _inverted_names(self) -> tuple[Pattern, str | None]:
        if self.new is None:
            return self.pattern, None
        self.refuse_regex()
        template = Pattern(self.new)
        if (template.num_stars, template.names) != (self.pattern.num_stars, self.pattern.names):
            raise self.refuse_inverse("its new name lacks a wildcard of the old one")
        return template, self.pattern.text


@dataclass(frozen=True)
class Transpose(OneToOne):
    """A rule that swaps two dims."""

    dim0: int = 0
    dim1: int = 1

    def _forward(self, name: str) -> Forward:
        def forward(tensors: list[Tensor]) -> list[Tensor]:
            tensor = tensors[0]
            if not all(-tensor.dim() <= dim < tensor.dim() for dim in (self.dim0, self.dim1)):
                raise ShapeMismatchError(f"{self}: {name} is {tuple(tensor.shape)}, which has no such dims.")
            return [tensor.transpose(self.dim0, self.dim1)]

        return forward

    def _backward(self, name: str) -> Backward:
        return lambda tensors, shapes: self._forward(name)(tensors)

    def inverse(self) -> Rule:
        pattern, new = self._inverted_names()
        return Transpose(pattern, new, self.dim0, self.dim1, optional=self.optional)

    def __str__(self) -> str:
        return f"transpose({str(self.pattern)!r}, {self.dim0}, {self.dim1})"


@dataclass(frozen=True)
class PermuteHeads(OneToOne):
    """A rule that reorders the rows of each head for another layout of rotary embeddings."""

    num_heads: int = 1
    to: str = "half"
    dim: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in ("half", "interleaved"):
            raise ConfigurationError(f"to={self.to!r} must be 'half' or 'interleaved'.")
        if not isinstance(self.num_heads, int) or self.num_heads < 1:
            raise ConfigurationError(f"num_heads={self.num_heads!r} must be a number of at least 1.")

    def _permuted(self, name: str, tensor: Tensor, to: str) -> Tensor:
        dim = self.dim + tensor.dim() if self.dim < 0 else self.dim
        if dim >= tensor.dim() or tensor.shape[dim] % (2 * self.num_heads):
            raise ShapeMismatchError(
                f"{self}: {name} is {tuple(tensor.shape)}, so dim {self.dim} is not {self.num_heads} heads of pairs."
            )
        pairs = tensor.shape[dim] // (2 * self.num_heads)
        inner = (pairs, 2) if to == "half" else (2, pairs)
        heads: Tensor = tensor.unflatten(dim, (self.num_heads, *inner))
        return heads.transpose(dim + 1, dim + 2).flatten(dim, dim + 2)

    def _forward(self, name: str) -> Forward:
        return lambda tensors: [self._permuted(name, tensors[0], self.to)]

    def _backward(self, name: str) -> Backward:
        return lambda tensors, shapes: [self._permuted(name, tensors[0], self._back)]

    @property
    def _back(self) -> str:
        return "interleaved" if self.to == "half" else "half"

    def inverse(self) -> Rule:
        pattern, new = self._inverted_names()
        return PermuteHeads(pattern, new, self.num_heads, self._back, self.dim, optional=self.optional)

    def __str__(self) -> str:
        return f"permute_heads({str(self.pattern)!r}, num_heads={self.num_heads}, to={self.to!r})"
