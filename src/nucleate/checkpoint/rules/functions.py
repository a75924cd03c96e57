"""The functions that make rules, and the function that inverts rules."""

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

    In a glob, `*` and `{name}` match a part of a name without dots, and `**` matches anything. The new name repeats
    these wildcards. A regular expression must match the whole name; the new name repeats its groups as `\1` or
    `\g<name>`.

    Args:
        pattern: A glob, or a compiled regular expression.
        new: The new name. If there are several, one tensor has all of these names, as a tied tensor has.
        optional: Whether the tensor may be missing.

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
        optional: Whether the tensor may be missing.
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
    """Join tensors side by side along a dim.

    Args:
        patterns: The tensors to join, in this order. One glob with a wildcard that is not in `new` joins all its
            tensors, in the order of their numbers.
        new: The name of the result.
        dim: The dim.
        sizes: The lengths of the parts, or numbers in the same ratio, such as counts of heads. The rule checks them,
            and `inverse` needs them.
        groups: Cut every tensor into this number of equal parts, and join the first parts of all tensors, then the
            second parts, and so on. A fused projection with grouped queries has its queries, keys and values in this
            order.
        optional: Whether the tensors may be missing.
    """
    return Join(
        sources=_several(patterns), new=new, dim=dim, sizes=_sizes(sizes), groups=groups, optional=optional
    )  # fmt: skip


def stack(patterns: PatternLike | Sequence[PatternLike], new: str, dim: int = 0, *, optional: bool = False) -> Rule:
    """Stack tensors of equal shape and dtype along a new dim.

    Args:
        patterns: A glob with a wildcard that `new` lacks, for all its tensors in the order of their numbers; or several
            patterns.
        new: The name of the result.
        dim: The new dim.
        optional: Whether the tensors may be missing.

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
        sizes: The lengths of the parts, or numbers in the same ratio. By default, all parts are equal.
        dim: The dim.
        groups: The number of groups in which the parts lie, as in `concatenate`.
        optional: Whether the tensor may be missing.
    """
    names = (new,) if isinstance(new, str) else tuple(new)
    return Part(
        pattern=Pattern.of(pattern), new=names, dim=dim, sizes=_sizes(sizes), groups=groups, optional=optional
    )  # fmt: skip


def unstack(pattern: PatternLike, new: str | Sequence[str], dim: int = 0, *, optional: bool = False) -> Rule:
    """Split each tensor along a dim into as many tensors as the dim is long.

    Args:
        pattern: A glob, or a compiled regular expression.
        new: A name with a wildcard that `pattern` lacks, which numbers the results; or the name of each result.
        dim: The dim, which the results do not have.
        optional: Whether the tensor may be missing.
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
        dim1: The other dim.
        new: The name of the result. By default, the name does not change.
        optional: Whether the tensor may be missing.
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
    """Reorder the rows of each head for another layout of rotary embeddings.

    Rotary embeddings rotate pairs of a head's rows. In the layout `"interleaved"` of Meta's LLaMA, the two rows of a
    pair follow one another. In the layout `"half"` of Hugging Face, the second rows of all pairs follow all first rows.

    Args:
        pattern: A glob, or a compiled regular expression.
        num_heads: The number of heads along `dim`.
        to: The layout of the result. The tensor must have the other layout.
        dim: The dim.
        new: The name of the result. By default, the name does not change.
        optional: Whether the tensor may be missing.
    """
    return PermuteHeads(Pattern.of(pattern), new, num_heads, to, dim, optional=optional)


def inverse(rules: Rule | Iterable[Rule]) -> list[Rule]:
    """Return the rules that undo `rules`, for example to map the names of another library back.

    Args:
        rules: Rules that lose nothing. `concatenate` must have `sizes`, the lengths of its parts.

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
