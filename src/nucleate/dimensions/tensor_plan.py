"""The plan of tensor parallel: which modules get which style, held against a model before anything is changed."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import nn

from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import Shard
from nucleate.shells import named_modules, named_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

#: A style by its word; `"fused_3"` stands for any number of parts.
Style: TypeAlias = Literal["colwise", "rowwise", "colwise_gathered", "sequence", "replicated"] | str

_WORDS = ("colwise", "rowwise", "colwise_gathered", "sequence", "replicated", "fused_3")
_FUSED = re.compile(r"fused_(\d+)")
#: The words in the name of a module that computes attention, or in that of its class.
_ATTENTION = re.compile(r"att", re.IGNORECASE)


@dataclass(frozen=True)
class TensorPlan:
    """The style of each module.

    Attributes:
        styles: The styles by pattern; see `TensorParallel`.
    """

    styles: Mapping[str, Any]

    @classmethod
    def of(cls, plan: object) -> TensorPlan:
        """Return a plan of a user.

        Raises:
            ConfigurationError: It is not a mapping of patterns to styles, or it is empty.
        """
        if not isinstance(plan, Mapping) or not plan or not all(isinstance(pattern, str) for pattern in plan):
            raise ConfigurationError(
                f"plan={plan!r} must give patterns of FQNs their styles, such as {{'layers.*.up': 'colwise'}}, or be "
                "'auto'."
            )
        for pattern, style in plan.items():
            if isinstance(style, str) and style not in _WORDS and not _num_parts(style):
                raise ConfigurationError(
                    f"the style {style!r} of the pattern {pattern!r} is unknown. Styles: {name_list(_WORDS)} (for any "
                    "number of parts), or an object of torch.distributed.tensor.parallel."
                )
            if not isinstance(style, str) and not hasattr(style, "_apply"):
                raise ConfigurationError(
                    f"the style of the pattern {pattern!r} is {style!r}, which is neither a word nor a ParallelStyle. "
                    f"Words: {name_list(_WORDS)}."
                )
        return cls(dict(plan))

    @property
    def is_known(self) -> bool:
        """Whether the placements of all tensors follow from words. An object of torch's decides by itself."""
        return all(isinstance(style, str) for style in self.styles.values())

    def modules(self, model: nn.Module) -> dict[str, tuple[nn.Module, Any]]:
        """Return the modules of the plan by FQN, each with its style.

        Raises:
            ConfigurationError: A pattern matches no module, or two patterns give one module different styles.
        """
        found: dict[str, tuple[nn.Module, Any]] = {}
        patterns: dict[str, str] = {}
        names = dict(named_modules(model))
        for pattern, style in self.styles.items():
            matching = [name for name in names if _matches(name, pattern)]
            if not matching:
                raise ConfigurationError(
                    f"the pattern {pattern!r} of the plan matches no module of {type(model).__name__}. "
                    f"{_like(pattern, names)}"
                )
            for name in matching:
                if found.get(name, (None, style))[1] != style:
                    raise ConfigurationError(
                        f"the patterns {patterns[name]!r} and {pattern!r} give {name} two styles, "
                        f"{found[name][1]!r} and {style!r}. Let one pattern match it."
                    )
                found[name] = names[name], style
                patterns[name] = pattern
        return found

    def splits(self, model: nn.Module) -> dict[str, Shard | None] | None:
        """Return the split of each parameter of the plan by FQN; None for one that each rank holds whole.

        `check` has accepted the model. None for all if the plan has an object of torch's.
        """
        if not self.is_known:
            return None
        return {
            f"{name}.{key}" if name else key: split
            for name, (module, style) in self.modules(model).items()
            for key, split in _splits_of(module, style)
        }

    def check(self, model: nn.Module, size: int) -> None:
        """Refuse a model that the plan does not fit.

        Args:
            model: The model.
            size: The number of ranks of the axis.

        Raises:
            ConfigurationError: See `TensorParallel.check_model`.
        """
        modules = self.modules(model)
        for name, (module, style) in modules.items():
            if not isinstance(style, str) or style in ("sequence", "replicated"):
                continue
            if not isinstance(module, (nn.Linear, nn.Embedding)) or (
                _num_parts(style) and isinstance(module, nn.Embedding)
            ):
                raise ConfigurationError(
                    f"the plan gives {name} the style {style!r}, which a {type(module).__name__} cannot have. Linear "
                    "layers and embeddings have it; an embedding is not fused."
                )
            _refuse_uneven(name, module, style, size)
        _refuse_heads(model, modules, size)
        self._refuse_half_ties(model)

    def apply(self, model: nn.Module, mesh: DeviceMesh, loss_parallel: bool) -> None:
        """Give each module its style, by torch's `parallelize_module`.

        Args:
            model: The model.
            mesh: torch's mesh of the axis.
            loss_parallel: Whether the gathered outputs stay split.
        """
        from torch.distributed.tensor.parallel import parallelize_module

        for module, style in self.modules(model).values():
            trains = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
            made = _style_of(style, module, loss_parallel) if isinstance(style, str) else style
            parallelize_module(module, mesh, made, src_data_rank=None)
            # torch's styles make new parameters, and some of them train frozen ones.
            for key, parameter in module.named_parameters():
                parameter.requires_grad_(trains[key])

    def _refuse_half_ties(self, model: nn.Module) -> None:
        known = self.splits(model)
        if known is None:
            return  # The ties are compared after `apply`.
        splits: dict[str, Any] = dict(known)
        ties: dict[int, list[str]] = {}
        for fqn, parameter in named_parameters(model, remove_duplicate=False):
            ties.setdefault(id(parameter), []).append(fqn)
        for names in ties.values():
            forms = {fqn: splits.get(fqn, "no style") for fqn in names}
            if len(set(forms.values())) > 1:
                listed = ", ".join(f"{fqn}: {form or 'whole'}" for fqn, form in forms.items())
                raise ConfigurationError(
                    f"{name_list(names)} are tied, and the plan lays them out in different ways ({listed}). Split both "
                    "along the same dim: an embedding by 'rowwise' and its head by 'colwise_gathered'."
                )


def _matches(name: str, pattern: str) -> bool:
    """Return whether a pattern describes a name, part by part."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _like(pattern: str, names: Mapping[str, nn.Module]) -> str:
    """Return a sentence with names of modules that are like a pattern."""
    import difflib

    plain = {re.sub(r"\d+", "*", name): None for name in names if name}
    close = difflib.get_close_matches(pattern, plain, n=3, cutoff=0.4)
    return f"It has {name_list(close or list(plain)[:6])}."


def _num_parts(style: str) -> int:
    """Return the number of parts of a fused weight, or 0 for another style."""
    found = _FUSED.fullmatch(style)
    return int(found[1]) if found else 0


def _splits_of(module: nn.Module, style: str) -> Iterator[tuple[str, Shard | None]]:
    """Yield the parameters of a module, each with the split that a style gives it."""
    for key, parameter in module.named_parameters():
        if style in ("sequence", "replicated") or (style == "rowwise" and key == "bias"):
            yield key, None
        elif isinstance(module, nn.Embedding):
            yield key, Shard(0 if style == "rowwise" else 1)
        elif style == "rowwise":
            yield key, Shard(parameter.dim() - 1)
        else:
            yield key, Shard(0, _num_parts(style) or 1)


def _refuse_uneven(name: str, module: nn.Module, style: str, size: int) -> None:
    """Refuse a dim that is not a multiple of the number of ranks."""
    parts = _num_parts(style) or 1
    for key, split in _splits_of(module, style):
        shape = module.get_parameter(key).shape
        if split is None or shape[split.dim] % (size * parts) == 0:
            continue
        of_parts = f" of each of {parts} parts" if parts > 1 else ""
        raise ConfigurationError(
            f"the style {style!r} of {name}.{key} of shape {tuple(shape)} splits dim {split.dim}{of_parts} over "
            f"tp={size}, and {shape[split.dim]} is not a multiple of {size * parts}. Choose another size of tp, pad "
            "the layer, or leave it out of the plan."
        )


def _refuse_heads(model: nn.Module, modules: Mapping[str, tuple[nn.Module, Any]], size: int) -> None:
    """Refuse a number of attention heads that the ranks cannot share, if the model's configuration has it."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    names = dict(named_modules(model))
    split = [
        name
        for name, (_, style) in modules.items()
        if isinstance(style, str) and (style == "colwise" or _num_parts(style))
        if _ATTENTION.search(name) or _ATTENTION.search(type(names[name.rpartition(".")[0]]).__name__)
    ]
    for field in ("num_attention_heads", "num_key_value_heads", "n_head"):
        heads = getattr(config, field, None)
        if split and isinstance(heads, int) and heads % size:
            raise ConfigurationError(
                f"the plan splits {name_list(split)}, and the configuration has {field}={heads}, which is not a "
                f"multiple of tp={size}. Choose a size of tp that divides it, or leave attention out of the plan."
            )


def _style_of(style: str, module: nn.Module, loss_parallel: bool) -> ParallelStyle:
    """Return torch's object for a word."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    if style == "colwise":
        return ColwiseParallel()
    if style == "rowwise":
        return RowwiseParallel(input_layouts=Replicate()) if isinstance(module, nn.Embedding) else RowwiseParallel()
    if style == "colwise_gathered":
        if loss_parallel and not isinstance(module, nn.Embedding):
            return ColwiseParallel(use_local_output=False)
        return ColwiseParallel(output_layouts=Replicate())
    if style == "sequence":
        return SequenceParallel()
    if style == "replicated":
        # The dim that is split does not matter to a module that works on the last one.
        return SequenceParallel(sequence_dim=0, use_local_output=True)
    from nucleate.dimensions.fused_style import FusedColwise

    return FusedColwise(_num_parts(style))
