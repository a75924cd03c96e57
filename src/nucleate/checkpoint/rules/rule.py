"""Rules: what is done to tensors by name while they are loaded, saved or converted.

A rule says which names it is about and what becomes of the tensors. It is plain data: applied to names, it gives moves,
each of some tensors into others. A move is torch code that only moves elements, so it is recorded on stand-ins of a
file's tensors, and it can be undone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nucleate.checkpoint.rules.pattern import Captures, Pattern, check_new_name, new_name
from nucleate.errors import CheckpointKeyError, ConfigurationError, ShapeMismatchError, name_list

#: Makes results of sources.
Forward = Callable[[list[Tensor]], list[Tensor]]
#: Makes the sources again, given their shapes.
Backward = Callable[[list[Tensor], list[tuple[int, ...]]], list[Tensor]]


@dataclass(frozen=True)
class Move:
    """What a rule does to some tensors.

    Attributes:
        sources: Their names.
        results: The names of what it makes of them.
        forward: Makes it; None where one tensor is only called otherwise, or is left out.
        backward: Undoes it.
    """

    sources: tuple[str, ...]
    results: tuple[str, ...]
    forward: Forward | None = None
    backward: Backward = field(default=lambda tensors, shapes: tensors)


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A rule on tensors by name. See `rename`, `concatenate`, `stack`, `split`, `transpose` and `permute_heads`.

    Attributes:
        optional: Whether it may find nothing.
    """

    optional: bool = False

    @abstractmethod
    def moves(self, names: Sequence[str]) -> list[Move]:
        """Return what it does to tensors of these names.

        Raises:
            CheckpointKeyError: Of the tensors that belong together, some are missing.
        """

    @abstractmethod
    def inverse(self) -> Rule:
        """Return the rule that undoes it.

        Raises:
            ConfigurationError: There is none, or it does not say enough.
        """

    @property
    @abstractmethod
    def patterns(self) -> tuple[Pattern, ...]:
        """What names it is about."""

    def _refuse_inverse(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self} cannot be undone: {why}.")

    def _refuse_regex(self) -> None:
        if any(pattern.is_regex for pattern in self.patterns):
            raise self._refuse_inverse("a regular expression says no name. Write it as a glob")


def _listed(names: Iterable[object]) -> str:
    texts = [repr(str(name)) for name in names]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


@dataclass(frozen=True)
class Rename(Rule):
    """Another name, or several for one tensor; none leaves it out."""

    pattern: Pattern
    new: tuple[str, ...]

    def __post_init__(self) -> None:
        for new in self.new:
            check_new_name(new, (self.pattern,))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def moves(self, names: Sequence[str]) -> list[Move]:
        found = [(name, captures) for name in names if (captures := self.pattern.match(name)) is not None]
        return [
            Move((name,), tuple(new_name(new, captures, self.pattern) for new in self.new)) for name, captures in found
        ]

    def inverse(self) -> Rule:
        self._refuse_regex()
        if not self.new:
            raise self._refuse_inverse("what is left out is gone")
        template = Pattern(self.new[0])
        if (template.num_stars, template.names) != (self.pattern.num_stars, self.pattern.names):
            raise self._refuse_inverse("its new name lacks a wildcard of the old one")
        rule = Rename(template, (self.pattern.text,), optional=self.optional)
        return (
            rule if len(self.new) == 1 else _FirstOf(rule.pattern, rule.new, rest=self.new[1:], optional=rule.optional)
        )

    def __str__(self) -> str:
        return f"rename({_listed(self.patterns)}, {_listed(self.new)})" if self.new else f"drop({str(self.pattern)!r})"


@dataclass(frozen=True)
class _FirstOf(Rename):
    """The inverse of a tensor under several names: the first, or the next one where that is not there."""

    rest: tuple[str, ...] = ()

    def moves(self, names: Sequence[str]) -> list[Move]:
        left: dict[str, Move] = {}
        for pattern in (self.pattern, *map(Pattern, self.rest)):
            for name in names:
                captures = pattern.match(name)
                if captures is not None:
                    result = new_name(self.new[0], captures, pattern)
                    # The further ones are the same tensor.
                    left[name] = Move((name,), () if any(result in m.results for m in left.values()) else (result,))
        return list(left.values())

    def inverse(self) -> Rule:
        return Rename(Pattern(self.new[0]), (self.pattern.text, *self.rest), optional=self.optional)


@dataclass(frozen=True)
class _OneToOne(Rule):
    """A rule that makes one tensor of one."""

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
        self._refuse_regex()
        template = Pattern(self.new)
        if (template.num_stars, template.names) != (self.pattern.num_stars, self.pattern.names):
            raise self._refuse_inverse("its new name lacks a wildcard of the old one")
        return template, self.pattern.text


@dataclass(frozen=True)
class Transpose(_OneToOne):
    """Two dims swapped."""

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
class PermuteHeads(_OneToOne):
    """The rows of each head in the order of another layout of rotary embeddings."""

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


@dataclass(frozen=True)
class _Sized(Rule):
    """What joins and splits have in common."""

    dim: int = 0
    sizes: tuple[int, ...] | None = None
    groups: int = 1

    def _check(self, count: int) -> None:
        if self.sizes is not None and (
            len(self.sizes) != count or not all(type(n) is int and n > 0 for n in self.sizes)
        ):
            raise ConfigurationError(f"{self}: sizes={self.sizes} must be {count} numbers of at least 1.")
        if type(self.groups) is not int or self.groups < 1:
            raise ConfigurationError(f"{self}: groups={self.groups!r} must be a number of at least 1.")

    def _place(self, shape: Sequence[int], names: str) -> int:
        dim = self.dim + len(shape) if self.dim < 0 else self.dim
        if not 0 <= dim < len(shape):
            raise ShapeMismatchError(f"{self}: {names} is {tuple(shape)}, which has no dim {self.dim}.")
        return dim

    def _joined(self, tensors: list[Tensor], names: Sequence[str]) -> Tensor:
        dim = self._place(tensors[0].shape, names[0])
        for name, tensor in zip(names, tensors, strict=True):
            first = tensors[0]
            one, other = (
                (*each.shape[:dim], *each.shape[dim + 1 :], each.dim(), str(each.dtype)) for each in (first, tensor)
            )
            if one != other:
                raise ShapeMismatchError(
                    f"{self}: {names[0]} is {first.dtype} {tuple(first.shape)} but {name} is {tensor.dtype} "
                    f"{tuple(tensor.shape)}; they must be equal but for dim {self.dim}."
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

    def _parts(self, tensor: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Return the parts of a tensor, of these lengths along the dim."""
        dim = self.dim + tensor.dim() if self.dim < 0 else self.dim
        if self.groups == 1:
            return list(tensor.split(list(lengths), dim))
        grouped = tensor.unflatten(dim, (self.groups, tensor.shape[dim] // self.groups))
        parts = grouped.split([length // self.groups for length in lengths], dim + 1)
        return [part.flatten(dim, dim + 1) for part in parts]

    def _lengths(self, tensor: Tensor, name: str, count: int) -> list[int]:
        """Return how long each of `count` parts of a tensor is."""
        dim = self._place(tensor.shape, name)
        length, sizes = tensor.shape[dim], self.sizes or (1,) * count
        if length % sum(sizes):
            wanted = f"sizes={self.sizes}" if self.sizes else f"{count} equal parts"
            raise ShapeMismatchError(
                f"{self}: {name} is {tuple(tensor.shape)}, and {length} along dim {self.dim} does not add up to "
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

    def _options(self) -> str:
        sizes = f", sizes={list(self.sizes)}" if self.sizes else ""
        return f", dim={self.dim}{sizes}{f', groups={self.groups}' if self.groups != 1 else ''}"


@dataclass(frozen=True)
class Join(_Sized):
    """Several tensors side by side along a dim, or along a new one."""

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
                f"{self}: a wildcard that is missing in the new name counts the tensors of one glob; give one glob."
            )
        self._check(len(self.sources) if self.index is None else len(self.sizes or ()))

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
                return [self._joined(tensors, names)]
            for name, tensor in zip(names, tensors, strict=True):
                if (tensor.shape, tensor.dtype) != (tensors[0].shape, tensors[0].dtype):
                    raise ShapeMismatchError(
                        f"{self}: {names[0]} is {tensors[0].dtype} {tuple(tensors[0].shape)} but {name} is "
                        f"{tensor.dtype} {tuple(tensor.shape)}; what is stacked must be equal."
                    )
            return [torch.stack(tensors, self.dim)]

        return forward

    def _backward(self, names: tuple[str, ...]) -> Backward:
        def backward(tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
            if self.stacks:
                return list(tensors[0].unbind(self.dim))
            return self._parts(tensors[0], [shape[self.dim] for shape in shapes])

        return backward

    def inverse(self) -> Rule:
        self._refuse_regex()
        pattern = Pattern(self.new)
        if self.index is not None:
            if not self.stacks:
                raise self._refuse_inverse("into how many parts it falls is not said. List the parts, with `sizes`")
            return Part(
                pattern=pattern, new=(self.sources[0].text,), dim=self.dim, unstacks=True, optional=self.optional
            )
        if self.stacks:
            new = tuple(source.text for source in self.sources)
            return Part(pattern=pattern, new=new, dim=self.dim, unstacks=True, optional=self.optional)
        if self.sizes is None and len(self.sources) > 1:
            raise self._refuse_inverse("how long its parts are is not said. Give `sizes`, of which the ratio counts")
        return Part(
            pattern=pattern,
            new=tuple(source.text for source in self.sources),
            dim=self.dim,
            sizes=self.sizes,
            groups=self.groups,
            optional=self.optional,
        )

    def __str__(self) -> str:
        return f"{'stack' if self.stacks else 'concatenate'}({_listed(self.sources)}, {self.new!r}{self._options()})"


@dataclass(frozen=True)
class Part(_Sized):
    """Several tensors of one: parts along a dim, or what was stacked along it."""

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
        self._check(len(self.new))

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (self.pattern,)

    def moves(self, names: Sequence[str]) -> list[Move]:
        return [
            _Parts(self, name, captures).move for name in names if (captures := self.pattern.match(name)) is not None
        ]

    def inverse(self) -> Rule:
        self._refuse_regex()
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
        return f"{'unstack' if self.unstacks else 'split'}({str(self.pattern)!r}, {_listed(self.new)}{self._options()})"


@dataclass(frozen=True)
class _Parts:
    """The move of one tensor into parts. How many there are may be known by its shape only."""

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
            return rule._parts(tensor, rule._lengths(tensor, self.name, len(rule.new)))
        dim = rule._place(tensor.shape, self.name)
        if rule.index is None and tensor.shape[dim] != len(rule.new):
            raise ShapeMismatchError(
                f"{rule}: {self.name} is {tuple(tensor.shape)}, of which dim {rule.dim} is not {len(rule.new)}."
            )
        return list(tensor.unbind(dim))

    def _backward(self, tensors: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        if self.rule.unstacks:
            return [torch.stack(tensors, self.rule.dim)]
        return [replace(self.rule, sizes=None)._joined(tensors, [self.name] * len(tensors))]


@dataclass(frozen=True)
class CountedMove(Move):
    """A move into as many tensors as the source's shape says.

    Attributes:
        names: The names of so many results.
    """

    names: Callable[[int], tuple[str, ...]] = field(default=lambda count: ())
