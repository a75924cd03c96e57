"""Which linear layers of a model are quantized: all plain ones but those that are named, tied or used otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from nucleate.errors import ConfigurationError

#: What is left in full precision unless the user says otherwise, as transformers does: the head that makes logits.
DEFAULT_SKIP = ("lm_head",)


def linears_of(model: nn.Module, skip: Sequence[str] | None = None) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers to quantize, by name: `torch.nn.Linear` itself, no class derived from it.

    Left alone are layers that `skip` names; layers whose weight another module holds as well, such as a head tied to
    an embedding; those without an element; and what a Hugging Face model keeps in float32 (`_keep_in_fp32_modules`),
    whose forward looks at the dtype of these weights.

    Args:
        model: The model.
        skip: Names, each of which stands for every module whose dotted name has it as a run of its parts: `"lm_head"`,
            `"layers.0"`, `"mlp.down_proj"`. None for `DEFAULT_SKIP` and what transformers takes for a head.

    Raises:
        ConfigurationError: A name in `skip` is that of no module.
    """
    chosen = DEFAULT_SKIP if skip is None else tuple(skip)
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in skip or () if not any(is_named(fqn, (name,)) for fqn in modules)]
    if unknown:
        raise ConfigurationError(
            f"skip names {unknown[0]!r}, but {type(model).__name__} has no module of that name, nor a part of a name. "
            "Give names as `model.named_modules()` has them, or runs of their parts."
        )
    holders: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add((id(module), name))
    kept = tuple(_kept_in_full(model))
    seen = {id(head) for head in _heads(model)} if skip is None else set[int]()
    for fqn, module in modules.items():
        # A class derived from it may use its weight in ways of its own, as the output projection of attention does.
        if type(module) is not nn.Linear or id(module) in seen:
            continue
        seen.add(id(module))
        is_alone = len(holders[id(module.weight)]) == 1 and module.weight.numel() > 0
        if is_alone and not is_named(fqn, chosen) and not is_named(fqn, kept):
            yield fqn, module


def is_named(fqn: str, names: Sequence[str]) -> bool:
    """Return whether a dotted name has one of `names` as a run of its parts.

    >>> is_named("model.layers.0.mlp", ("layers.0",)), is_named("model.layers.01.mlp", ("layers.0",))
    (True, False)
    """
    return any(f".{name}." in f".{fqn}." for name in names)


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """Yield what transformers leaves alone of its models: the output embeddings, and a last layer without a bias."""
    # `get_keys_to_not_convert` (transformers/quantizers/base.py, 5.23); no model of another library has the method.
    find = getattr(model, "get_output_embeddings", None)
    if not callable(find):
        return
    head = find()
    if isinstance(head, nn.Module):
        yield head
    last = next(reversed(dict(model.named_parameters())), "")
    if last.endswith(".weight"):
        yield model.get_submodule(last.removesuffix(".weight"))


def _kept_in_full(model: nn.Module) -> Iterator[str]:
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            # Hugging Face's convention; no model of another library has the names.
            yield from getattr(module, attribute, None) or ()
