"""The integration of transformers: construction, loading, units and inference methods of its models."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import final

from torch import nn
from transformers import PreTrainedModel

from nucleate import Integration, Precision, Strategy
from nucleate.cluster import Communicator
from nucleate.plugin import Composition
from nucleate.precision import NoCastPrecision
from nucleate.strategies import Parallel, SingleDeviceStrategy, declare_units
from nucleate_transformers.construction import construction
from nucleate_transformers.folder import save_unsharded
from nucleate_transformers.generation import CommonGeneration
from nucleate_transformers.tensor_plan import declare_plans


@final
class TransformersIntegration(Integration):
    """The integration that lets transformers construct, load and run models for a `Runtime`."""

    name = "transformers"

    def __init__(self) -> None:
        # Until `check` gives the runtime's own, parts that do nothing.
        self._strategy: Strategy = SingleDeviceStrategy()
        self._precision: Precision = NoCastPrecision()
        self._shards = False

    def check(self, composition: Composition) -> None:
        """Store the precision, and whether the strategy shards."""
        assert isinstance(composition.strategy, Strategy)
        assert isinstance(composition.precision, Precision)
        self._precision = composition.precision
        self._strategy = composition.strategy
        self._shards = composition.strategy.shards and composition.environment.world_size > 1

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which `from_pretrained` binds weights to their files instead of reading them."""
        communicator = Communicator(self.environment, self.device)
        return construction(communicator, self.device, self._precision, self._strategy)

    def setup(self, model: nn.Module) -> nn.Module:
        """Declare plans, and as units the blocks that transformers does not split; let ranks generate equally long."""
        if self._splits_matrices:
            declare_plans(model)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):
                names = set(part._no_split_modules or ())
                declare_units(module for module in part.modules() if type(module).__name__ in names)
                if self._splits_matrices and part.can_generate():
                    CommonGeneration(self._strategy).surround(part)
                if self._shards:
                    # transformers itself sets this if FSDP2 shards (transformers/distributed/fsdp.py, 5.23).
                    # `generate` then continues with empty steps until every rank has finished.
                    part.__dict__["_is_fsdp_managed_module"] = True
                    part.__dict__["save_pretrained"] = partial(save_unsharded, part)
        return model

    @property
    def _splits_matrices(self) -> bool:
        return isinstance(self._strategy, Parallel) and self._strategy.mesh.size_of("tp") > 1

    def inference_methods(self, model: nn.Module) -> Iterable[str]:
        """Return `generate` for a model that can generate."""
        return ("generate",) if isinstance(model, PreTrainedModel) and model.can_generate() else ()
