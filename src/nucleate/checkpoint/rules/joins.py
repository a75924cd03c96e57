"""Rules that join several tensors into one, and rules that split one tensor into several. They invert each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nucleate.checkpoint.rules.pattern import Captures, Pattern, check_new_name, new_name
from nucleate.checkpoint.rules.rule import Backward, CountedMove, Forward, Move, Rule, listed
from nucleate.checkpoint.rules.sized import Sized
from nucleate.errors import CheckpointKeyError, ConfigurationError, ShapeMismatchError, name_list


@dataclass(frozen=True)
class Join(Sized):
    """A rule that joins several tensors side by side along a dim, or stacks them along a new dim."""

    sources: tuple[Pattern, ...] = ()
    new: str = ""
    stacks: bool = False
    index: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigurationError(f"{self} has nothing to join.")
        object.__setattr__(self, "index", check_new_name(self.new, self.sources, index=True))
        if self.index is not None and (len(self.sources) > 1 or self.sources[0].is_regex):
            raise ConfigurationError(
                f"{self}: the new name lacks a wildcard, which then numbers the tensors of one glob; give one glob."
            )
        self.check_sizes(len(self.sources) if self.index is None else len(self.sizes or ()))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return self.sources

    def moves(self, names: Sequence[str]) -> list[Move]:
        groups: dict[Captures, dict[int, str]] = {}
        for place, pattern in enumerate(self.sources):
            for name in names:
                captures = pattern.match(name)
                if captures is None:
                    continue
                if self.index is None:
                    groups.setdefault(captures, {})[place] = name
                    continue
                number = captures.stars[-1] if not self.index else dict(captures.named)[self.index]
                if number.isdigit():
                    groups.setdefault(captures.without(self.index or None), {})[int(number)] = name
        moves = []
        for captures, found in groups.items():
            count = len(self.sources) if self.index is None else max(found) + 1
            result = new_name(self.new, captures, self.sources[0])
            missing = [self._name(number, captures) for number in range(count) if number not in found]
            if missing:
                raise CheckpointKeyError(
                    f"{self}: {result} lacks {name_list(missing)}, while there is {name_list(list(found.values()))}."
                )
            ordered = tuple(found[number] for number in range(count))
            moves.append(Move(ordered, (result,), self._forward(ordered), self._backward(ordered)))
        return moves

    def _name(self, number: int, captures: Captures) -> str:
        if self.index is not None:
            name = self.sources[0].fill(captures.plus(self.index or None, str(number)))
        else:
            name = self.sources[number].fill(captures)
        return name or f"a name of {str(self.sources[number].text)!r} for {captures}"

    def _forward(self, names: tuple[str, ...]) -> Forward:
        def forward(tensors: list[Tensor]) -> list[Tensor]:
            if not self.stacks:
                return [self.joined(tensors, names)]
            for name, tensor in zip(names, tensors, strict=True):
                if (tensor.shape, tensor.dtype) != (tensors[0].shape, tensors[0].dtype):
                    raise ShapeMismatchError(
                        f"{self}: {names[0]} is {tensors[0].dtype} {tuple(tensors[0].shape)} but {name} is "
                        f"{tensor.dtype} {tuple(tensor.shape)}; stacked tensors must have equal shapes and dtypes."
                    )
            return [torch.stack(tensors, self.dim)]

        return forward

    def _backward(self, names: tuple[str, ...]) -> Backward:
        def backward(tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
            if self.stacks:
                return list(tensors[0].unbind(self.dim))
            return self.parts(tensors[0], [shape[self.dim] for shape in shapes])

        return backward

    def inverse(self) -> Rule:
        self.refuse_regex()
        pattern = Pattern(self.new)
        if self.index is not None:
            if not self.stacks:
                raise self.refuse_inverse("the number of its parts is unknown. List the parts, with `sizes`")
            return Part(
                pattern=pattern, new=(self.sources[0].text,), dim=self.dim, unstacks=True, optional=self.optional
            )
        if self.stacks:
            new = tuple(source.text for source in self.sources)
            return Part(pattern=pattern, new=new, dim=self.dim, unstacks=True, optional=self.optional)
        if self.sizes is None and len(self.sources) > 1:
            raise self.refuse_inverse("the lengths of its parts are unknown. Give `sizes`; their ratio is enough")
        return Part(
            pattern=pattern,
            new=tuple(source.text for source in self.sources),
            dim=self.dim,
            sizes=self.sizes,
            groups=self.groups,
            optional=self.optional,
        )

    def __str__(self) -> str:
        return f"{'stack' if self.stacks else 'concatenate'}({listed(self.sources)}, {self.new!r}{self.options()})"


@dataclass(frozen=True)
class Part(Sized):
    """A rule that splits one tensor into parts along a dim, or unstacks a dim."""

    pattern: Pattern = field(default_factory=lambda: Pattern("*"))
    new: tuple[str, ...] = ()
    unstacks: bool = False
    index: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not self.new:
            raise ConfigurationError(f"{self} has no names for the parts.")
        index = None
        if self.unstacks and len(self.new) == 1 and not self.pattern.is_regex:
            index = check_new_name(self.pattern.text, (Pattern.of(self.new[0]),), index=True)
        if index is None:
            for new in self.new:
                check_new_name(new, (self.pattern,))
        object.__setattr__(self, "index", index)
        self.check_sizes(len(self.new))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def moves(self, names: Sequence[str]) -> list[Move]:
        return [
            _Parts(self, name, captures).move for name in names if (captures := self.pattern.match(name)) is not None
        ]

    def inverse(self) -> Rule:
        self.refuse_regex()
        sizes = self.sizes or ((1,) * len(self.new) if not self.unstacks else None)
        return Join(
            sources=tuple(map(Pattern, self.new)),
            new=self.pattern.text,
            dim=self.dim,
            sizes=sizes,
            groups=self.groups,
            stacks=self.unstacks,
            optional=self.optional,
        )

    def __str__(self) -> str:
        return f"{'unstack' if self.unstacks else 'split'}({str(self.pattern)!r}, {listed(self.new)}{self.options()})"


@dataclass(frozen=True)
class _Parts:
    """The move of one tensor into parts. The number of parts may depend on the tensor's shape."""

    rule: Part
    name: str
    captures: Captures

    @property
    def move(self) -> Move:
        if self.rule.index is not None:
            return CountedMove((self.name,), (), self._forward, self._backward, names=self._numbered)
        results = tuple(new_name(new, self.captures, self.rule.pattern) for new in self.rule.new)
        return Move((self.name,), results, self._forward, self._backward)

    def _numbered(self, count: int) -> tuple[str, ...]:
        template = Pattern(self.rule.new[0])
        filled = [template.fill(self.captures.plus(self.rule.index or None, str(number))) for number in range(count)]
        return tuple(name for name in filled if name is not None)

    def _forward(self, tensors: list[Tensor]) -> list[Tensor]:
        tensor, rule = tensors[0], self.rule
        if not rule.unstacks:
            return rule.parts(tensor, rule.lengths(tensor, self.name, len(rule.new)))
        dim = rule.place(tensor.shape, self.name)
        if rule.index is None and tensor.shape[dim] != len(rule.new):
            raise ShapeMismatchError(
                f"{rule}: {self.name} is {tuple(tensor.shape)}; its dim {rule.dim} must have the length "
                f"{len(rule.new)}."
            )
        return list(tensor.unbind(dim))

    def _backward(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        if self.rule.unstacks:
            return [torch.stack(tensors, self.rule.dim)]
        return [replace(self.rule, sizes=None).joined(tensors, [self.name] * len(tensors))]
