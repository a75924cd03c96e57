"""Makes a configuration of transformers small without knowing the architecture.

Names say what a number means: heads, layers, widths, vocabularies. All widths become the same number, so that parts
that must fit still do. Where an architecture does not build like this, the changes are tried one after another on
the meta device, and those are kept after which it still builds.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.architectures.case import NotBuildable

#: How many parameters a model may have.
BUDGET = 30_000_000
#: How long may be tried for one model.
SEARCH_S = 40.0

WIDTH, HEADS, HEAD_DIM, LAYERS, VOCABULARY = 64, 4, 16, 2, 512


@dataclass(frozen=True)
class Place:
    """A field of a configuration or of one inside it."""

    owner: Any
    name: str

    def get(self) -> Any:
        # Not `getattr`: a configuration whose layers differ refuses to answer for all of them.
        return self.owner[self.name] if isinstance(self.owner, dict) else vars(self.owner)[self.name]

    def set(self, value: Any) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.name] = value
        else:
            setattr(self.owner, self.name, value)


def _ints(change: Callable[[int], int]) -> Callable[[Any, Any], Any]:
    """Return a rule for a field: an integer, or a collection of integers, is changed by `change`."""

    def rule(value: Any, config: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, int):
            return change(value)
        if isinstance(value, (list, tuple)) and all(type(item) is int for item in value):
            return type(value)(change(item) for item in value)
        return value

    return rule


def _single(change: Callable[[int], int]) -> Callable[[Any, Any], Any]:
    """Return a rule that leaves collections alone."""
    return lambda value, config: change(value) if type(value) is int else value


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _key_value_heads(value: Any, config: Any) -> Any:
    return min(value, 2) if type(value) is int else value


def _in_proportion(value: Any, config: Any) -> Any:
    """Make a list of widths smaller and keep their proportions."""
    is_list = isinstance(value, (list, tuple)) and bool(value) and all(type(item) is int for item in value)
    if not is_list or min(value) <= WIDTH // 2:
        return value
    # In multiples of what normalization groups by.
    return type(value)(-(-item // min(value)) * (WIDTH // 2) for item in value)


_HEADS = r"(.*_)?(num|n)_(.*_)?heads(_.*)?|.*attention_heads|(.*_)?n_head|num_heads|encoder_attention_heads|heads"
_WIDTHS = (
    r"(.*_)?(hidden|embed|embedding|proj|projection|projector|model|inner|output|out|latent|codevector|encoder|decoder"
    r"|adapter|resampler|fusion|fpn|neck|bottleneck|feature|context|query|text|vision|audio|visual|mask_feature|pooler)"
    r"_(.*_)?(size|dim|dims|channels)|d_model|n_embd|embed_dim|hidden_dim|dim|attention_dim|out_dim|input_dim"
)
_NO_WIDTHS = re.compile(
    r".*(vocab|image|patch|window|kernel|chunk|head_dim|head_size|token|batch|grid|grids|crop|step|buffer|pool_size"
    r"|context_size|scale|stride|codebook_size|state).*|in_channels|num_channels|feature_size|input_size|audio_channels"
)
_LAYERS = (
    r"(.*_)?num_hidden_layers|(.*_)?(n|num)_(.*_)?(layers|blocks|residual_layers|stacks)|(.*_)?(encoder|decoder)_layers"
    r"|n_layer|layers|depth|(.*_)?depth|num_layer|num_block|(.*_)?num_layers"
)


def _rule(step: str, pattern: str, rule: Callable[[Any, Any], Any]) -> tuple[str, re.Pattern[str], Any]:
    return step, re.compile(pattern), rule


#: (name of the step, pattern of field names, rule), in the order in which they are tried.
RULES = [
    _rule("layers", _LAYERS, _single(_at_most(LAYERS))),
    _rule("depths", r"depths|(.*_)?num_blocks|blocks_per_stage|stage_num_blocks|num_block_repeats", _ints(_at_most(2))),
    _rule("vocabulary", r".*vocab_size.*|codebook_size|num_embeddings|n_words", _single(_at_most(VOCABULARY))),
    _rule("tokens", r".*(token|pad|bos|eos|cls|sep|mask|unk)_(id|idx|index)", _ints(_at_most(VOCABULARY - 1))),
    _rule("experts", r"(.*_)?(num|n)_(.*_)?experts|num_experts", _single(_at_most(4))),
    _rule("chosen", r"(.*_)?(experts_per_tok(en)?|moe_topk|moe_k|top_k|topk_experts)", _single(_at_most(2))),
    _rule("groups", r"n_groups?|topk_groups?|num_expert_groups?|topk_method", _single(_at_most(1))),
    _rule(
        "intermediate",
        r".*(intermediate|ffn|feed_?forward|mlp|linear_units|classifier_proj)_?(.*_)?(size|dim|hidden_size)|d_ff"
        r"|n_inner|.*_ffn|.*linear_units",
        _single(_at_most(2 * WIDTH)),
    ),
    _rule("ranks", r".*(lora_)?rank", _single(_at_most(16))),
    _rule(
        "head_dim",
        r"(.*_)?head_dim|d_kv|dim_head|(.*_)?head_size|mamba_d_head|mamba_head_dim",
        _single(_at_most(HEAD_DIM)),
    ),
    _rule("rope_dim", r"qk_(rope|nope)_head_dim|rotary_dim", _single(_at_most(HEAD_DIM // 2))),
    _rule("heads", _HEADS, _single(_at_most(HEADS))),
    _rule("kv_heads", r".*(key_value|kv)_heads|num_kv", _key_value_heads),
    _rule("widths", _WIDTHS, _single(_at_most(WIDTH))),
    _rule(
        "channels",
        r"upsample_initial_channel|emb_dim|base_(channels|dim)|(model|inner)_channels|dim|c|d_latents",
        _single(_at_most(32)),
    ),
    _rule("filters", r"num_filters|n_filters", _single(_at_most(8))),
    _rule("hashes", r"encoder_hash_byte_group_vocab|ngram_vocab_size_base", _single(_at_most(VOCABULARY))),
    _rule(
        "blocks",
        r"(.*_)?layers_per_block|num_self_attends_per_block|num_cross_attention_layers|transformer_layers_per_block"
        r"|.*num_layers_per_block",
        _ints(_at_most(1)),
    ),
    _rule(
        "positions",
        r"max_position_embeddings|n_positions|max_(source|target)_positions|max_seq_len.*|block_size",
        _single(_at_most(2048)),
    ),
]

#: For hierarchies: their widths are lists.
LISTS = (
    "lists",
    re.compile(
        r"(.*_)?(channels|dims?|hidden_sizes|widths|features|embed_dim|depths|num_channels)(_per_stage)?|c_hidden"
    ),
    _in_proportion,
)


def places(config: Any) -> Iterator[Place]:
    """Yield the fields of a configuration and of those inside it."""
    fields = config if isinstance(config, dict) else vars(config)
    for name, value in list(fields.items()):
        if not isinstance(name, str) or name.startswith("_") or name in ("id2label", "label2id", "rope_parameters"):
            continue
        if hasattr(type(value), "model_type") or (isinstance(value, dict) and name.endswith("config")):
            yield from places(value)
        else:
            yield Place(config, name)


def _changes(
    config: Any, step: str, pattern: re.Pattern[str], rule: Callable[[Any, Any], Any]
) -> Iterator[tuple[Place, Any]]:
    for place in places(config):
        if pattern.fullmatch(place.name) and not (step == "widths" and _NO_WIDTHS.fullmatch(place.name)):
            value = place.get()
            changed = rule(value, place.owner)
            if changed != value:
                yield place, changed


def _owners(config: Any) -> list[Any]:
    found = {id(place.owner): place.owner for place in places(config)}
    return list(found.values())


def _shorten(config: Any) -> None:
    """Give each sub-configuration few layers, of all the kinds that it has, and lists of that length."""
    for owner in _owners(config):
        if isinstance(owner, dict):
            continue
        count = next(
            (vars(owner)[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if n in vars(owner)),
            None,
        )
        if type(count) is not int:
            continue
        lists = {
            place.name: place.get()
            for place in places(owner)
            if place.owner is owner and isinstance(place.get(), (list, tuple)) and len(place.get()) == count
        }
        kept: list[int] = []
        for name, values in lists.items():
            if "types" in name or "type" in name:
                kept += [values.index(kind) for kind in dict.fromkeys(values)]
        kept = sorted(set(kept) | set(range(min(LAYERS, count))))[:6]
        for name, values in lists.items():
            _try_set(Place(owner, name), type(values)(values[index] for index in kept))
        for place in places(owner):
            value = place.get()
            if place.owner is owner and re.fullmatch(r"num_hidden_layers|n_layer|num_layers|n_layers", place.name):
                if type(value) is int and value == count:
                    _try_set(place, len(kept))
            elif place.owner is owner and re.fullmatch(r".*(index|indexes|indices|idxs|ids|layers)", place.name):
                is_list = isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value)
                if is_list and place.name not in lists and max(value) < count + 1:
                    _try_set(place, type(value)(dict.fromkeys(item % len(kept) for item in value)))


def _try_set(place: Place, value: Any) -> bool:
    before = place.get()
    try:
        place.set(value)
    except Exception:
        try:
            place.set(before)
        except Exception:
            return False
        return False
    return True


def _fit_rotary_sections(config: Any) -> None:
    for owner in _owners(config):
        parameters = owner.get("rope_parameters") if isinstance(owner, dict) else vars(owner).get("rope_parameters")
        if isinstance(parameters, dict) and isinstance(parameters.get("mrope_section"), (list, tuple)):
            parameters["mrope_section"] = [2, 3, 3]


def _prepare(config: Any) -> None:
    """Change what would ask the network, or needs a package for speed only."""
    for place in list(places(config)):
        if place.name in ("use_pretrained_backbone", "pretrained") and place.get():
            _try_set(place, False)
        if place.name == "head_dim" and place.get() is None and not isinstance(place.owner, dict):
            hidden, heads = (vars(place.owner).get(name) for name in ("hidden_size", "num_attention_heads"))
            if type(hidden) is int and type(heads) is int:
                _try_set(place, hidden // heads)
        if place.name == "vocab_size" and place.get() is None:
            _try_set(place, VOCABULARY)


def clamped(config: Any) -> Any:
    """Return a copy with every rule applied."""
    config = copy.deepcopy(config)
    _prepare(config)
    _shorten(config)
    for step, pattern, rule in RULES:
        if step == "layers":
            # Those that `_shorten` has not set.
            rule = _single(_at_most(6))
        for place, value in list(_changes(config, step, pattern, rule)):
            _try_set(place, value)
    _fit_rotary_sections(config)
    return config


def searched(config: Any, num_parameters: Callable[[Any], int], deadline_s: float) -> tuple[Any, int]:
    """Return a copy with as many rules applied as it bears, and its number of parameters.

    Args:
        config: It builds as it is.
        num_parameters: Builds it on the meta device; raises where it does not build.
        deadline_s: When to stop, by `time.monotonic`.
    """
    config = copy.deepcopy(config)
    _prepare(config)

    def attempt(change: Callable[[Any], object]) -> bool:
        nonlocal config, count
        candidate = copy.deepcopy(config)
        change(candidate)
        try:
            smaller = num_parameters(candidate)
        except Exception:
            return False
        config, count = candidate, smaller
        return True

    shortened = copy.deepcopy(config)
    _shorten(shortened)
    count = -1
    if not attempt(_shorten) and not attempt(lambda candidate: None):
        num_parameters(config)
    for step, pattern, rule in (*RULES, LISTS):
        if time.monotonic() > deadline_s:
            break

        def whole(candidate: Any, step: str = step, pattern: Any = pattern, rule: Any = rule) -> None:
            for place, value in list(_changes(candidate, step, pattern, rule)):
                _try_set(place, value)

        if attempt(whole) or count <= BUDGET:
            continue
        for index in range(len(list(_changes(config, step, pattern, rule)))):

            def one(
                candidate: Any, index: int = index, step: str = step, pattern: Any = pattern, rule: Any = rule
            ) -> None:
                changes = list(_changes(candidate, step, pattern, rule))
                if index < len(changes):
                    _try_set(*changes[len(changes) - 1 - index])

            attempt(one)
    return config, count


def small(config: Any, num_parameters: Callable[[Any], int]) -> tuple[Any, str]:
    """Return a small copy of a configuration that builds, and how it was found.

    Raises:
        NotBuildable: None builds within the budget.
    """
    candidate = clamped(config)
    try:
        if num_parameters(candidate) <= 2 * BUDGET:
            return candidate, "clamped"
        reason = "too large when clamped"
        for place, value in list(_changes(candidate, *LISTS)):
            _try_set(place, value)
        if num_parameters(candidate) <= 2 * BUDGET:
            return candidate, "clamped, and lists of widths too"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    try:
        found, count = searched(config, num_parameters, time.monotonic() + SEARCH_S)
    except Exception as error:
        raise NotBuildable(f"clamped: {reason[:300]}; as it is: {type(error).__name__}: {str(error)[:300]}") from error
    if count > 12 * BUDGET:
        raise NotBuildable(f"{count:,d} parameters are left; clamped: {reason[:300]}")
    return found, f"searched, because {reason[:200]}"
