"""Tensor parallel: the matrices of a layer are split over an axis, and each rank computes with its part.

The styles are torch's own (`torch.distributed.tensor.parallel`). A plan says by FQN which module gets which one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import nn

from nucleate.dimensions.base import Dimension, Placements
from nucleate.dimensions.common_stream import share_random_stream
from nucleate.dimensions.equal_gradients import EqualGradients
from nucleate.dimensions.model_plan import DeclaredPlans, missing_integration
from nucleate.dimensions.tensor_plan import Style, TensorPlan
from nucleate.errors import ConfigurationError, name_list
from nucleate.layout import Mesh, Shard, axes_of, is_sharded
from nucleate.shells import named_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle


class TensorParallel(Dimension):
    """Matrices that are split over the axis `tp`.

    Args:
        plan: For patterns of FQNs of modules, the style of each. In a pattern, `*` stands for one part of a name:
            `"layers.*.mlp.up"`. A style is one of these words, or an object of torch's `ParallelStyle`:

            - `"colwise"`: each rank has some of the outputs of a linear layer, or of the columns of an embedding. The
              output stays split, for a `"rowwise"` layer.
            - `"rowwise"`: each rank has some of the inputs of a linear layer, or of the rows of an embedding. The
              output is added up over the ranks.
            - `"colwise_gathered"`: as `"colwise"`, and the output is gathered, as for a head.
            - `"fused_3"`: as `"colwise"` for a weight that holds 3 matrices of equal size one below the other, such as
              query, key and value. Each rank has a part of each. Other numbers are allowed.
            - `"sequence"`: whole parameters, and an input that is split along dim 1, the sequence.
            - `"replicated"`: whole parameters in a module whose input the layers before have split, such as a norm of
              each head. Their gradients are added up over the ranks.

            A module without a style stays whole, and sees whole inputs. `"auto"` takes the plan of the model itself:
            one that an integration has declared (`declare_plan`), as for models of transformers, or else the words in
            `model.tp_plan`.
        loss_parallel: Compute the cross entropy of logits that stay split over the vocabulary
            (`torch.distributed.tensor.parallel.loss_parallel`). A `"colwise_gathered"` head then keeps its output
            split, and the loss must be computed in `runtime.forward_backward`.

    Raises:
        ConfigurationError: The plan is not valid.

    Example:
        >>> print(TensorParallel({"layers.*.up": "colwise", "layers.*.down": "rowwise"}))
        TensorParallel(2 patterns)
    """

    name = "tensor_parallel"
    axes = ("tp",)
    lays_out = True

    def __init__(
        self, plan: Mapping[str, Style | ParallelStyle] | str = "auto", *, loss_parallel: bool = False
    ) -> None:
        self._plan = None if plan == "auto" else TensorPlan.of(plan)
        self.loss_parallel = loss_parallel
        self._is_in_step = False
        self._gradients = EqualGradients(_has_style)

    def plan_of(self, model: nn.Module) -> TensorPlan | DeclaredPlans:
        """Return the plan for a model.

        Raises:
            ConfigurationError: The plan is `"auto"`, and the model has none, or one that only an integration can apply.
        """
        if self._plan is not None:
            return self._plan
        declared = DeclaredPlans.of(model)
        if declared is not None:
            return declared
        found = getattr(model, "tp_plan", None)
        if not found:
            raise ConfigurationError(
                f"TensorParallel(plan='auto') reads the plan that a model brings in `tp_plan`, and "
                f"{type(model).__name__} has none. Give a plan, such as {{'layers.*.up': 'colwise'}}."
            )
        try:
            return TensorPlan.of(found)
        except ConfigurationError as error:
            advice = missing_integration(model)
            raise ConfigurationError(f"`{type(model).__name__}.tp_plan`: {error} {advice}".rstrip()) from None

    @property
    def is_auto(self) -> bool:
        """Whether the dimension takes the plan of the model."""
        return self._plan is None

    def check_model(self, model: nn.Module, mesh: Mesh) -> None:
        """Refuse a plan that does not fit the model.

        Raises:
            ConfigurationError: A pattern matches nothing, a size is not a multiple of the number of ranks, or the plan
                splits one of two tied parameters, or a quantized weight; or the model is split already. The message
                gives the FQNs.
        """
        _refuse_split(model)
        plan = self.plan_of(model)
        if self.loss_parallel and isinstance(plan, DeclaredPlans):
            raise ConfigurationError(
                f"loss_parallel=True needs logits that stay split, and the plan that {type(model).__name__} brings "
                "gathers them. Leave loss_parallel out, or give TensorParallel a plan of words, such as "
                "{'layers.*.up': 'colwise'}."
            )
        _refuse_quantized(model, plan.splits(model) or {})
        plan.check(model, mesh.size_of("tp"))

    def placements(self, model: nn.Module, mesh: Mesh) -> Placements | None:
        """Return the split of each parameter of the plan; None if the plan has an object of torch's."""
        splits = self.plan_of(model).splits(model)
        if splits is None:
            return None
        return {fqn: {} if split is None else {"tp": split} for fqn, split in splits.items()}

    def apply(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """Give each module of the plan its style."""
        self.plan_of(model).apply(model, mesh["tp"], self.loss_parallel)

    def step_context(self) -> AbstractContextManager[object]:
        """Return the context in which the loss takes split logits, with `loss_parallel`."""
        # torch's context ends for good when an inner one ends.
        return nullcontext() if not self.loss_parallel or self._is_in_step else self._step()

    @contextmanager
    def _step(self) -> Iterator[None]:
        from torch.distributed.tensor.parallel import loss_parallel

        self._is_in_step = True
        try:
            with loss_parallel():
                yield
        finally:
            self._is_in_step = False

    def enclose(self, model: nn.Module) -> nn.Module:
        """Let the ranks of a group draw the same random numbers in each forward that trains.

        Their gradients of whole parameters are compared once, at the first step.
        """
        self._gradients.add(model)
        share_random_stream(model, self.mesh.group(self.device.type, self.axes), self.device)
        return model

    def before_step(self) -> None:
        """Compare the gradients of parameters that all ranks of a group hold whole, at the first step of each model.

        Raises:
            RankDisagreementError: They differ; the message gives the FQNs.
        """
        self._gradients.check(self.mesh.group(self.device.type, self.axes))

    def __repr__(self) -> str:
        plan = "'auto'" if self._plan is None else f"{len(self._plan.styles)} patterns"
        return f"TensorParallel({plan}{', loss_parallel=True' if self.loss_parallel else ''})"


def _refuse_split(model: nn.Module) -> None:
    """Refuse a model that something else has split before."""
    split = [fqn for fqn, parameter in named_parameters(model) if is_sharded(parameter)]
    if split:
        raise ConfigurationError(
            f"{name_list(split)} are DTensors already. Give `setup` the model as it was constructed, inside "
            "`runtime.init_module()`: it splits the model itself."
        )


def _refuse_quantized(model: nn.Module, splits: Mapping[str, Shard | None]) -> None:
    """Refuse the split of a weight that is packed, so that its dims are not those of the layer."""
    parameters = dict(named_parameters(model, remove_duplicate=False))
    packed = {fqn: parameters[fqn].dtype for fqn, split in splits.items() if split is not None and fqn in parameters}
    quantized = [
        f"{fqn} ({dtype})" for fqn, dtype in packed.items() if not (dtype.is_floating_point or dtype.is_complex)
    ]
    if quantized:
        raise ConfigurationError(
            f"the plan splits {name_list(quantized)}, and a quantized weight cannot be split over tp. Choose a "
            "precision that does not quantize, or strategy='fsdp', which shards quantized weights."
        )


def _has_style(parameter: Any) -> bool:
    """Return whether a parameter is a DTensor over the axis."""
    return "tp" in axes_of(parameter)
