"""The tensor parallel plans of transformers, applied by transformers' own functions.

All names of transformers' private or new functions for tensor parallel (`transformers.distributed`, 5.23) stand in this
file: `_resolve_parallel_plans`, `apply_tensor_parallelism`, `ALL_PARALLEL_STYLES` and `_tp_size`. They change meta
tensors only, so nothing is exchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

from nucleate.dimensions import ModelPlan, declare_plan
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import Shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: The style of a module whose whole parameters see a part of the heads.
_SUMMED = "replicated_with_grad_allreduce"
#: The styles that make the parameters of a module DTensors that each rank holds whole.
_WHOLE = ("sequence_parallel",)
#: The styles that split a parameter: the dim, counted from the end, and the number of its parts that are each split.
_SPLITS = {
    "colwise": (-2, 1),
    "colwise_gather_output": (-2, 1),
    "colwise_rep": (-2, 1),
    "rowwise": (-1, 1),
    "rowwise_split_input": (-1, 1),
    "rowwise_rep": (-1, 1),
    "packed_colwise": (-2, 2),
    "packed_rowwise": (-1, 2),
}
#: The styles that split an embedding, and the dim.
_EMBEDDINGS = {"embedding_rowwise": 0, "embedding_colwise": 1}
#: The styles that split no parameter by themselves.
_UNSPLIT = (
    _SUMMED,
    "mla_kv_a_proj",
    "all_reduce",
    "moe_tp_experts",
    "moe_identity_expert",
    "local_params",
    "replicate",
)
#: The layers whose outputs contain the keys of attention.
_KEYS = ("k_proj", "v_proj", "qkv_proj", "query_key_value")


class TransformersPlan(ModelPlan):
    """The plan in `model.tp_plan`."""

    def check(self, model: nn.Module, size: int) -> None:
        """Refuse a model that its plan does not fit.

        Raises:
            ConfigurationError: The model has no plan, a size is not a multiple of the number of ranks, or the plan
                splits one of two tied parameters.
        """
        styles = concrete_plan(model, size)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for fqn, split in _splits(styles, parameters).items():
            _refuse_uneven(fqn, styles[fqn], split, parameters[fqn], size)
        _refuse_heads(model, styles, size)
        _refuse_half_ties(model, styles, parameters)

    def splits(self, model: nn.Module) -> Mapping[str, Shard | None] | None:
        """Return the split of each parameter of the plan; None if a style is unknown here."""
        styles = concrete_plan(model, 2)  # the number of ranks does not matter
        if not all(_is_known(style) for style in styles.values()):
            return None
        return _splits(styles, dict(model.named_parameters(remove_duplicate=False)))

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Let transformers lay the model out. Tied parameters stay tied, and frozen ones frozen."""
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        styles = concrete_plan(model, mesh.size())
        modules = dict(model.named_modules())
        summed = [modules[fqn] for fqn, style in styles.items() if style == _SUMMED and fqn in modules]
        trains = {fqn: p.requires_grad for fqn, p in model.named_parameters(remove_duplicate=False)}
        ties = list(_ties(model))
        # transformers looks for a name among the parameters without duplicates.
        seconds = {fqn for names in ties for fqn in names[1:]}
        theirs = {fqn: style for fqn, style in styles.items() if fqn not in seconds and style != _SUMMED}
        apply_tensor_parallelism(model, mesh, theirs)
        for module in summed:
            GradientSum(mesh).follow(module)
        for first, *others in ties:
            for fqn in others:
                owner, _, key = fqn.rpartition(".")
                model.get_submodule(owner)._parameters[key] = model.get_parameter(first)
        for fqn, parameter in model.named_parameters(remove_duplicate=False):
            # The style `sequence_parallel` makes new parameters, which train.
            parameter.requires_grad_(trains[fqn])
        # `generate` sizes a static cache by it.
        model._tp_size = mesh.size()  # type: ignore[assignment]


class GradientSum:
    """The sum of the gradients of whole parameters that see a part of the heads, over the ranks of an axis.

    It replaces transformers' own style, which adds up what has been accumulated: with several backwards for one step,
    that counts the earlier ones twice (transformers 5.23).

    Args:
        mesh: torch's mesh of the axis.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._hooked: dict[str, weakref.ref[nn.Parameter]] = {}

    def follow(self, module: nn.Module) -> None:
        """Add up the gradients of a module's parameters from now on."""
        module.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: nn.Module, _: object) -> None:
        # Here, because `fully_shard` calls forward with parameters that it makes later than this object.
        if not torch.is_grad_enabled():
            return
        for name, parameter in module.named_parameters(recurse=False):
            known = self._hooked.get(name)
            if parameter.requires_grad and (known is None or known() is not parameter):
                parameter.register_hook(self._sum)
                self._hooked[name] = weakref.ref(parameter)

    def _sum(self, gradient: Tensor) -> Tensor:
        import torch.distributed as dist

        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._mesh.get_group())
        return total


def declare_plans(model: nn.Module) -> None:
    """Declare the plans of the models of transformers in a model, as `Runtime.setup` does.

    This is for questions before setup, such as `Parallel.planned_layout`.

    Args:
        model: The model. Parts of it may be models of transformers.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            declare_plan(part, TransformersPlan())


def concrete_plan(model: nn.Module, size: int, rules: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the style of each module and each parameter in the plan of a model, by FQN.

    Args:
        model: A model of transformers.
        size: The number of ranks, at least 2.
        rules: Rules that replace those of the model's plan, or are added to it, for good.

    Raises:
        ConfigurationError: The model has no plan, or a rule is unknown.
    """
    assert isinstance(model, PreTrainedModel)
    try:
        plan = None if rules is None else dict(rules)
        found, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=size, tp_plan=plan))
    except ValueError as error:
        raise ConfigurationError(
            f"transformers cannot apply the tensor parallel plan of {type(model).__name__}: {error} TensorParallel "
            "also takes a plan of words, such as {'layers.*.up': 'colwise'}."
        ) from None
    return dict(found)


def _is_known(style: str) -> bool:
    return style in _SPLITS or style in _EMBEDDINGS or style in _UNSPLIT or style in _WHOLE


def _splits(styles: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> dict[str, Shard | None]:
    """Return the split of each parameter that becomes a DTensor; see `ModelPlan.splits`."""
    found: dict[str, Shard | None] = {}
    for fqn, style in styles.items():
        if fqn not in parameters:
            if style in _WHOLE:
                found.update({name: None for name in parameters if name.rpartition(".")[0] == fqn})
            continue
        num_dims = parameters[fqn].dim()
        if style in _EMBEDDINGS:
            found[fqn] = Shard(_EMBEDDINGS[style])
        elif style in _SPLITS:
            dim, parts = _SPLITS[style]
            if num_dims == 1:
                # A bias: with the outputs, or added once to the sum. Packed outputs of one dim are split as one.
                is_whole = dim == -1 and (style == "packed_rowwise" or fqn.endswith(".bias"))
                found[fqn] = None if is_whole else Shard(0)
            else:
                found[fqn] = Shard(num_dims + dim, parts)
    return found


def _refuse_uneven(fqn: str, style: str, split: Shard | None, parameter: nn.Parameter, size: int) -> None:
    """Refuse a dim that is not a multiple of the number of ranks."""
    if split is None or parameter.shape[split.dim] % (size * split.split_factor) == 0:
        return
    parts = f" of each of {split.split_factor} parts" if split.split_factor > 1 else ""
    cure = (
        f" or pad the vocabulary by `model.resize_token_embeddings(pad_to_multiple_of={size})`"
        if style in _EMBEDDINGS or "gather_output" in style
        else " or give TensorParallel a plan that leaves the layer whole"
    )
    raise ConfigurationError(
        f"the style {style!r} of {fqn} of shape {tuple(parameter.shape)} splits dim {split.dim}{parts} over tp={size}, "
        f"and {parameter.shape[split.dim]} is not a multiple of {size * split.split_factor}. Choose another size of "
        f"tp,{cure}."
    )


def _refuse_heads(model: nn.Module, styles: Mapping[str, str], size: int) -> None:
    """Refuse a number of attention heads that the ranks cannot share."""
    modules = dict(model.named_modules())
    for name, style in styles.items():
        owner, _, key = name.rpartition(".")
        if style != "colwise" or name not in modules or "att" not in type(modules[owner]).__name__.lower():
            continue
        config: Any = getattr(modules[owner], "config", None) or getattr(model, "config", None)
        fields = ("num_key_value_heads",) if key in ("k_proj", "v_proj") else ("num_attention_heads",)
        for field in (*fields, "num_key_value_heads") if key in _KEYS else fields:
            heads = getattr(config, field, None)
            if isinstance(heads, int) and heads % size:
                raise ConfigurationError(
                    f"the plan of {type(model).__name__} splits {name} by heads, and {field}={heads} is not a multiple "
                    f"of tp={size}. Choose a size of tp that divides {heads}."
                )


def _refuse_half_ties(model: nn.Module, styles: Mapping[str, str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse tied parameters of which the plan splits one, or splits them along different dims."""
    splits: Mapping[str, Any] = _splits(styles, parameters)
    for names in _ties(model):
        forms = {fqn: str(splits.get(fqn) or "whole") for fqn in names}
        if len(set(forms.values())) > 1:
            listed = ", ".join(f"{fqn}: {form}" for fqn, form in forms.items())
            rules = {fqn.removesuffix(".weight"): "embedding_rowwise" for fqn in names if not splits.get(fqn)}
            cure = f"Add the missing rule before setup, by `model.tp_plan.update({rules})`, or" if rules else "Instead,"
            raise ConfigurationError(
                f"{name_list(names)} are tied, and the plan of {type(model).__name__} lays them out in different ways "
                f"({listed}). {cure} make the model with `tie_word_embeddings=False`."
            )


def _ties(model: nn.Module) -> Iterable[list[str]]:
    """Yield the FQNs of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(fqn)
    return (found for found in names.values() if len(found) > 1)
