"""The rules as users write them, and rules the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nucleate.checkpoint.rules.joins import Join, Part
from nucleate.checkpoint.rules.pattern import Pattern, PatternLike
from nucleate.checkpoint.rules.permutations import PermuteHeads, Transpose
from nucleate.checkpoint.rules.renames import Rename
from nucleate.checkpoint.rules.rule import Rule
from nucleate.errors import ConfigurationError


def rename(pattern: PatternLike, *new: str, optional: bool = False) -> Rule:
    r"""Give tensors other names.

    In a glob `*` and `{name}` stand for a part of a name without dots, and `**` for anything. A new name repeats them.
    After a regular expression, which has to match the whole name, a new name has its groups as `\1` or `\g<name>`.

    Args:
        pattern: A glob, or a compiled regular expression.
        new: The new name; several make one tensor known under all of them, as tied tensors are.
        optional: Whether there may be no such tensor.

    Example:
        >>> print(rename("model.layers.{i}.mlp.{part}.weight", "h.{i}.mlp.{part}.weight"))
        rename('model.layers.{i}.mlp.{part}.weight', 'h.{i}.mlp.{part}.weight')
    """
    if not new:
        raise ConfigurationError(f"rename({str(pattern)!r}) has no new name. To leave tensors out use `drop`.")
    return Rename(Pattern.of(pattern), new, optional=optional)


def drop(pattern: PatternLike, *, optional: bool = False) -> Rule:
    """Leave tensors out.

    Args:
        pattern: A glob, or a compiled regular expression.
        optional: Whether there may be no such tensor.
    """
    return Rename(Pattern.of(pattern), (), optional=optional)


def concatenate(
    patterns: PatternLike | Sequence[PatternLike],
    new: str,
    dim: int = 0,
    *,
    sizes: Sequence[int] | None = None,
    groups: int = 1,
    optional: bool = False,
) -> Rule:
    """Lay tensors side by side along a dim.

    Args:
        patterns: What is joined, in this order. Of one glob with a wildcard that `new` lacks, all tensors in the order
            of their numbers.
        new: The name of the result.
        dim: The dim.
        sizes: How long the parts are, or numbers in the same ratio, such as counts of heads. They are checked, and
            `inverse` needs them.
        groups: Cut every tensor into so many equal parts, and lay the first parts of all side by side, then the second
            parts, and so on. So lie queries, keys and values in a fused projection with grouped queries.
        optional: Whether there may be no such tensors.
    """
    return Join(
        sources=_several(patterns), new=new, dim=dim, sizes=_sizes(sizes), groups=groups, optional=optional
    )  # fmt: skip


def stack(patterns: PatternLike | Sequence[PatternLike], new: str, dim: int = 0, *, optional: bool = False) -> Rule:
    """Lay equal tensors one behind another along a new dim.

    Args:
        patterns: A glob with a wildcard that `new` lacks, for all tensors in the order of their numbers; or several
            patterns.
        new: The name of the result.
        dim: The new dim.
        optional: Whether there may be no such tensors.

    Example:
        >>> print(stack("layers.{i}.experts.{expert}.up.weight", "layers.{i}.experts.up"))
        stack('layers.{i}.experts.{expert}.up.weight', 'layers.{i}.experts.up', dim=0)
    """
    return Join(sources=_several(patterns), new=new, dim=dim, stacks=True, optional=optional)


def split(
    pattern: PatternLike,
    new: Sequence[str],
    sizes: Sequence[int] | None = None,
    dim: int = 0,
    *,
    groups: int = 1,
    optional: bool = False,
) -> Rule:
    """Cut tensors into parts along a dim.

    Args:
        pattern: A glob, or a compiled regular expression.
        new: The names of the parts.
        sizes: How long the parts are, or numbers in the same ratio; by default all are equal.
        dim: The dim.
        groups: In how many groups the parts lie, as in `concatenate`.
        optional: Whether there may be no such tensor.
    """
    names = (new,) if isinstance(new, str) else tuple(new)
    return Part(
        pattern=Pattern.of(pattern), new=names, dim=dim, sizes=_sizes(sizes), groups=groups, optional=optional
    )  # fmt: skip


def unstack(pattern: PatternLike, new: str | Sequence[str], dim: int = 0, *, optional: bool = False) -> Rule:
    """Make of tensors as many as one of their dims is long.

    Args:
        pattern: A glob, or a compiled regular expression.
        new: A name with a wildcard that `pattern` lacks, which counts the results; or the name of each.
        dim: The dim, which the results do not have.
        optional: Whether there may be no such tensor.
    """
    names = (new,) if isinstance(new, str) else tuple(new)
    return Part(pattern=Pattern.of(pattern), new=names, dim=dim, unstacks=True, optional=optional)


def transpose(
    pattern: PatternLike, dim0: int = 0, dim1: int = 1, new: str | None = None, *, optional: bool = False
) -> Rule:
    """Swap two dims.

    Args:
        pattern: A glob, or a compiled regular expression.
        dim0: One dim.
        dim1: The other one.
        new: The name of the result; by default the same.
        optional: Whether there may be no such tensor.
    """
    return Transpose(Pattern.of(pattern), new, dim0, dim1, optional=optional)


def permute_heads(
    pattern: PatternLike,
    num_heads: int,
    to: str = "half",
    dim: int = 0,
    new: str | None = None,
    *,
    optional: bool = False,
) -> Rule:
    """Bring the rows of each head into the order of another layout of rotary embeddings.

    Rotary embeddings turn pairs of a head's rows. In the layout `"interleaved"`, that of Meta's LLaMA, the rows of a
    pair follow one another. In the layout `"half"`, that of Hugging Face, the second ones stand behind all first ones.

    Args:
        pattern: A glob, or a compiled regular expression.
        num_heads: How many heads lie behind one another along `dim`.
        to: The layout of the result; the tensor is in the other one.
        dim: The dim.
        new: The name of the result; by default the same.
        optional: Whether there may be no such tensor.
    """
    return PermuteHeads(Pattern.of(pattern), new, num_heads, to, dim, optional=optional)


def inverse(rules: Rule | Iterable[Rule]) -> list[Rule]:
    """Return the rules that undo some rules: a map from one library's names to another's, and back.

    Args:
        rules: Rules that lose nothing. `concatenate` says by `sizes` how long its parts are.

    Raises:
        ConfigurationError: A rule cannot be undone.

    Example:
        >>> print(*inverse([concatenate(["a", "b"], "ab", sizes=[2, 1])]))
        split('ab', ['a', 'b'], dim=0, sizes=[2, 1])
    """
    given = [rules] if isinstance(rules, Rule) else list(rules)
    for rule in given:
        if not isinstance(rule, Rule):
            raise ConfigurationError(f"{rule!r} is not a rule, and only rules can be undone.")
    return [rule.inverse() for rule in reversed(given)]


def _several(patterns: PatternLike | Sequence[PatternLike]) -> tuple[Pattern, ...]:
    if isinstance(patterns, (list, tuple)):
        return tuple(map(Pattern.of, patterns))
    return (Pattern.of(patterns),)  # type: ignore[arg-type]


def _sizes(sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if sizes is None else tuple(sizes)
