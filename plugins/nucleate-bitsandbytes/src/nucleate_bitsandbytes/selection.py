"""Selection of the linear layers to quantize: plain ones that nobody named, tied, uses otherwise or trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from nucleate.errors import ConfigurationError

#: The head that makes logits stays in full precision by default, as in transformers.
DEFAULT_SKIP = ("lm_head",)


def linears_of(model: nn.Module, skip: Sequence[str] | None = None) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the layers to quantize, by name: only `torch.nn.Linear` itself, not its subclasses.

    These layers are not quantized: layers that `skip` names; layers whose weight another module holds too, such as a
    head tied to an embedding; layers without elements; and layers that a Hugging Face model keeps in float32
    (`_keep_in_fp32_modules`), because its forward reads the dtype of these weights.

    Args:
        model: The model.
        skip: Names such as `"lm_head"`, `"layers.0"`, `"mlp.down_proj"`. A name matches each module whose dotted name
            contains these parts one after another. None skips `DEFAULT_SKIP` and the modules that transformers treats
            as a head.

    Raises:
        ConfigurationError: A name in `skip` does not match any module.
    """
    chosen = DEFAULT_SKIP if skip is None else tuple(skip)
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in skip or () if not any(is_named(fqn, (name,)) for fqn in modules)]
    if unknown:
        raise ConfigurationError(
            f"skip names {unknown[0]!r}, but {type(model).__name__} has no module with that name or part of a name. "
            "Give names from `model.named_modules()`, or consecutive parts of such names."
        )
    holders: dict[int, set[tuple[int, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), set()).add((id(module), name))
    kept = tuple(_kept_in_full(model))
    # With an adapter around it, a head is a module with several layers.
    heads = () if skip is not None else _heads(model)
    seen = {id(part) for head in heads for part in head.modules()}
    for fqn, module in modules.items():
        # A subclass may use its weight in its own way, as the output projection of attention does.
        if type(module) is not nn.Linear or id(module) in seen:
            continue
        seen.add(id(module))
        is_alone = len(holders[id(module.weight)]) == 1 and module.weight.numel() > 0
        if is_alone and not is_named(fqn, chosen) and not is_named(fqn, kept):
            yield fqn, module


def is_named(fqn: str, names: Sequence[str]) -> bool:
    """Return whether a dotted name contains the parts of one of `names`, one after another.

    >>> is_named("model.layers.0.mlp", ("layers.0",)), is_named("model.layers.01.mlp", ("layers.0",))
    (True, False)
    """
    return any(f".{name}." in f".{fqn}." for name in names)


def _heads(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that transformers does not quantize: the output embeddings, and a last layer without a bias."""
    # As `get_keys_to_not_convert` (transformers/quantizers/base.py, 5.23). Only models of transformers have the method.
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
            # Hugging Face's convention; only models of its libraries have these names.
            yield from getattr(module, attribute, None) or ()
