"""What rules make of tensors, what undoes it, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nucleate.checkpoint import (
    Rule,
    concatenate,
    drop,
    inverse,
    permute_heads,
    rename,
    split,
    stack,
    transpose,
    unstack,
)
from nucleate.checkpoint.rules.renaming import Item, Renaming
from nucleate.errors import CheckpointKeyError, ConfigurationError, ShapeMismatchError

pytestmark = pytest.mark.usefixtures("factories_on_device")


def applied(tensors: dict[str, Tensor], rules: object) -> dict[str, Tensor]:
    """Apply rules to real tensors."""
    items = {name: Item(tensor, (name,)) for name, tensor in tensors.items()}
    renaming: Renaming[Tensor] = Renaming(items, lambda tensor: tensor, "the test")
    renaming.apply(rules)  # type: ignore[arg-type]
    return {name: renaming.tensor(item) for name, item in renaming.items.items()}


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


A, B = numbered(4, 6), numbered(4, 6) + 100
LAYERS = {f"h.{i}.{p}.{kind}": numbered(n, 3) + i for i in (0, 1, 10) for p, n in (("q", 8), ("k", 4), ("v", 4)) for
          kind in ("weight", "bias")}  # fmt: skip


def test_tensors_get_other_names_in_the_order_that_they_had() -> None:
    found = applied({"a": A, "m.0.w": B, "c": A}, [rename("m.*.w", "n.*.v"), {"^c$": "d"}, lambda key: key.upper()])
    assert list(found) == ["A", "N.0.V", "D"]


def test_one_tensor_may_have_several_names() -> None:
    found = applied({"a": A}, rename("a", "b", "c"))
    assert found["b"] is found["c"] is A


def test_what_is_dropped_is_gone() -> None:
    assert list(applied({"a.inv": A, "b": B}, [drop("*.inv"), drop("nothing", optional=True)])) == ["b"]


def test_parts_are_joined_layer_by_layer() -> None:
    rule = concatenate(["h.{i}.q.{kind}", "h.{i}.k.{kind}", "h.{i}.v.{kind}"], "h.{i}.qkv.{kind}", sizes=[2, 1, 1])
    found = applied(LAYERS, rule)
    assert set(found) == {f"h.{i}.qkv.{kind}" for i in (0, 1, 10) for kind in ("weight", "bias")}
    assert torch.equal(found["h.10.qkv.bias"], torch.cat([LAYERS[f"h.10.{p}.bias"] for p in "qkv"]))


def test_groups_of_queries_keys_and_values_lie_side_by_side() -> None:
    q, k, v = numbered(8, 3), numbered(4, 3) + 100, numbered(4, 3) + 200
    found = applied({"q": q, "k": k, "v": v}, concatenate(["q", "k", "v"], "qkv", groups=2))
    assert torch.equal(found["qkv"], torch.cat([q[:4], k[:2], v[:2], q[4:], k[2:], v[2:]]))


def test_experts_are_stacked_by_their_numbers() -> None:
    tensors = {f"l.{i}.e.{e}.w": numbered(2, 3) + 10 * e for i in range(2) for e in (10, *range(10))}
    for rule in (stack("l.{i}.e.{e}.w", "l.{i}.w"), stack("l.*.e.*.w", "l.*.w")):
        found = applied(tensors, rule)
        assert set(found) == {"l.0.w", "l.1.w"}
        assert torch.equal(found["l.1.w"], torch.stack([tensors[f"l.1.e.{e}.w"] for e in range(11)]))
        back = applied(found, inverse(rule))
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_all_of_one_glob_are_concatenated_by_their_numbers() -> None:
    found = applied({f"s.{i}": A + i for i in (1, 0, 2)}, concatenate("s.*", "s", dim=1))
    assert torch.equal(found["s"], torch.cat([A, A + 1, A + 2], 1))


def test_a_tensor_is_cut_into_parts() -> None:
    assert torch.equal(applied({"a": A}, split("a", ["x", "y"], dim=1))["y"], A[:, 3:])
    assert torch.equal(applied({"a": A}, split("a", ["x", "y"], [1, 2], dim=-1))["x"], A[:, :2])
    assert torch.equal(applied({"a": A}, unstack("a", ["p", "q", "r", "s"]))["r"], A[2])


def test_rotary_layouts_are_those_of_hugging_faces_conversion() -> None:
    # `permute` in transformers/models/llama/convert_llama_weights_to_hf.py, 5.23.
    weight = numbered(16, 5)
    expected = weight.view(2, 8 // 2, 2, 5).transpose(1, 2).reshape(16, 5)
    found = applied({"q": weight}, permute_heads("q", num_heads=2))
    assert torch.equal(found["q"], expected)
    assert torch.equal(applied(found, permute_heads("q", num_heads=2, to="interleaved"))["q"], weight)


BIJECTIONS: list[Rule] = [
    rename("a", "c"),
    transpose("a"),
    transpose("a", 0, 1, new="c"),
    concatenate(["a", "b"], "c", sizes=[1, 1]),
    concatenate(["a", "b"], "c", dim=1, sizes=[6, 6], groups=3),
    stack(["a", "b"], "c", dim=1),
    split("a", ["c", "d"], [1, 3]),
    split("a", ["c", "d"], [1, 2], dim=1, groups=2),
    unstack("a", "c.{i}", dim=1),
    unstack("a", "c.*"),
    permute_heads("a", num_heads=2, new="c"),
    permute_heads("a", num_heads=3, dim=1, to="interleaved"),
]


@given(st.lists(st.sampled_from(BIJECTIONS), min_size=1, max_size=1), st.booleans())
@settings(max_examples=60)
def test_the_inverse_undoes_it(rules: list[Rule], twice: bool) -> None:
    tensors = {"a": A, "b": B}
    back = applied(applied(tensors, rules), inverse(inverse(inverse(rules))) if twice else inverse(rules))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_map_of_many_rules_is_undone_from_its_end() -> None:
    rules = [
        concatenate([f"h.{{i}}.{p}.{{kind}}" for p in "qkv"], "h.{i}.qkv.{kind}", sizes=[2, 1, 1]),
        rename("h.{i}.qkv.{kind}", "layer.{i}.{kind}"),
        transpose("layer.{i}.weight"),
    ]
    found = applied(LAYERS, rules)
    assert found["layer.10.weight"].shape == (3, 16)
    back = applied(found, inverse(rules))
    assert back.keys() == LAYERS.keys()
    assert all(torch.equal(back[name], LAYERS[name]) for name in LAYERS)


def test_a_tensor_of_several_names_comes_back_as_the_first_that_is_there() -> None:
    rule = rename("e", "wte", "head")
    for names in (["wte", "head"], ["wte"], ["head"]):
        assert list(applied(dict.fromkeys(names, A), inverse(rule))) == ["e"]
    assert list(applied({"e": A}, inverse(inverse(rule)))) == ["wte", "head"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inverse(concatenate(["a", "b"], "c")), "the lengths of its parts are unknown. Give `sizes`"),
        (lambda: inverse(concatenate("a.*", "c")), "the number of its parts is unknown"),
        (lambda: inverse(drop("a")), "the tensors that it leaves out are lost"),
        (lambda: inverse(rename(re.compile("a(.)"), r"b\1")), "a regular expression cannot make a name"),
        (lambda: inverse(rename("a.{i}", "b")), "lacks a wildcard"),
        (lambda: inverse([{"a": "b"}]), "is not a rule, and only rules can be undone"),
        (lambda: rename("a"), "has no new name. To leave tensors out use `drop`"),
        (lambda: concatenate([], "c"), "has nothing to join"),
        (lambda: split("a", []), "has no names for the parts"),
        (lambda: concatenate(["a", "b"], "c", sizes=[1]), "must be 2 numbers of at least 1"),
        (lambda: concatenate(["a", "b"], "c", groups=0), "groups=0 must be a number of at least 1"),
        (lambda: concatenate(["a.*", "b"], "c"), "must have the same wildcards"),
        (lambda: stack("a.{x}.{y}", "c"), "more than one wildcard is missing"),
        (lambda: permute_heads("a", 2, to="meta"), "to='meta' must be 'half' or 'interleaved'"),
        (lambda: permute_heads("a", 0), "num_heads=0 must be"),
    ],
)
def test_rules_that_cannot_be_are_refused_at_once(make: object, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        make()  # type: ignore[operator]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        (
            rename("x.*", "y.*"),
            CheckpointKeyError,
            "rename('x.*', 'y.*') finds nothing in the test. Its 4 keys are like",
        ),
        (rename("*", "y"), CheckpointKeyError, "both become y"),
        (rename("a", "b"), CheckpointKeyError, "a becomes b, but there is a b already"),
        (split("a", ["p", "p"]), CheckpointKeyError, "two tensors of one name"),
        (concatenate(["a", "gone"], "c"), CheckpointKeyError, "c lacks gone, while there is a."),
        (stack("s.*", "s"), CheckpointKeyError, "s lacks s.0, while there is s.1"),
        (
            concatenate(["a", "long"], "c"),
            ShapeMismatchError,
            "a is torch.float32 (4, 6) but long is torch.float32 (2, 7); they must be equal except in dim 0",
        ),
        (
            stack(["a", "long"], "c"),
            ShapeMismatchError,
            "a is torch.float32 (4, 6) but long is torch.float32 (2, 7); stacked tensors must have equal",
        ),
        (concatenate(["a", "b"], "c", sizes=[2, 1]), ShapeMismatchError, "a (4, 6), b (4, 6) are not in the ratio"),
        (concatenate(["a", "b"], "c", groups=3), ShapeMismatchError, "a has 4, b has 4 along dim 0"),
        (concatenate(["a", "b"], "c", dim=2), ShapeMismatchError, "a is (4, 6), which has no dim 2"),
        (split("a", ["p", "q", "r"]), ShapeMismatchError, "a is (4, 6), and 4 along dim 0 cannot be divided into 3"),
        (split("a", ["p", "q"], [5, 6]), ShapeMismatchError, "cannot be divided into sizes=(5, 6)"),
        (unstack("a", ["p", "q"]), ShapeMismatchError, "a is (4, 6); its dim 0 must have the length 2"),
        (transpose("a", 0, 2), ShapeMismatchError, "a is (4, 6), which has no such dims"),
        (permute_heads("a", 3), ShapeMismatchError, "dim 0 is not 3 heads of pairs"),
    ],
)
def test_what_does_not_fit_is_said_with_names_and_shapes(rule: Rule, kind: type[Exception], message: str) -> None:
    tensors = {"a": A, "b": B, "long": numbered(2, 7), "s.1": A}
    with pytest.raises(kind) as error:
        applied(tensors, rule)
    assert message in str(error.value)


def test_other_dtypes_are_not_joined() -> None:
    with pytest.raises(ShapeMismatchError, match=r"a is torch.float32 .* but b is torch.float64"):
        applied({"a": A, "b": B.double()}, concatenate(["a", "b"], "c"))


def test_an_input_that_is_missing_in_one_layer_is_named() -> None:
    tensors = {name: tensor for name, tensor in LAYERS.items() if name != "h.1.k.weight"}
    with pytest.raises(CheckpointKeyError, match=r"h\.1\.qkv\.weight lacks h\.1\.k\.weight"):
        applied(tensors, concatenate([f"h.{{i}}.{p}.{{kind}}" for p in "qkv"], "h.{i}.qkv.{kind}"))
