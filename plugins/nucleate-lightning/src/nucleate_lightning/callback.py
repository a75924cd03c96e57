"""The callback `Materialize`: a deferred model gets its values at the moment when the Trainer needs them.

The Trainer calls, in this order: the callbacks' `setup`, the module's `setup`, `configure_model`, and the strategy's
`setup`, which moves the model, wraps it and builds the optimizers (lightning/pytorch/trainer/trainer.py, `_run`,
2.6.6). No hook of a callback lies between `configure_model` and the strategy. So this callback puts a function in front
of the strategy's `setup`, on this one strategy object, until the function is called.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.tensor import DTensor

from nucleate.deferred import handle_of, held_tensors
from nucleate.errors import UninitializedError, name_list
from nucleate.materialize import materialize


class Materialize(Callback):
    """The callback that gives a deferred model its values, on the device of the Trainer's strategy.

    It serves `fit`, `validate`, `test` and `predict`. It makes tensors twice in each: those that are deferred when the
    callbacks are set up, so that later callbacks and the module's `setup` find values, and those that `setup` and
    `configure_model` defer, before the strategy takes the model. Under `ModelParallelStrategy` it leaves out the first
    time, because `configure_model` shards the model; see `sharding`. A model without deferred tensors is left alone.

    Raises:
        UninitializedError: A shard has no value, because it was sharded inside `deferred()` or on the meta device.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from nucleate_lightning import Materialize
        >>> trainer = Trainer(accelerator="cpu", callbacks=[Materialize()], logger=False)
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if not isinstance(strategy, ModelParallelStrategy):
            _materialize(trainer, pl_module)
        take_model = strategy.setup

        def setup(trainer: Trainer) -> None:
            self._restore(trainer)
            _refuse_empty_shards(pl_module)
            _materialize(trainer, pl_module)
            take_model(trainer)

        strategy.setup = setup  # type: ignore[method-assign]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore(trainer)

    @staticmethod
    def _restore(trainer: Trainer) -> None:
        """Let the strategy's class answer `strategy.setup` again."""
        vars(trainer.strategy).pop("setup", None)


def _materialize(trainer: Trainer, module: LightningModule) -> None:
    """Materialize a module, and its copies that other callbacks keep."""
    # Lightning's FSDPStrategy takes the model from the CPU and moves it unit by unit.
    is_fsdp = isinstance(trainer.strategy, FSDPStrategy)
    device = torch.device("cpu") if is_fsdp else trainer.strategy.root_device
    kept = [value for callback in trainer.callbacks for value in vars(callback).values()]  # type: ignore[attr-defined]
    # The search for a module's tensors would lead through the Trainer, and through all of its data.
    module.trainer = None
    try:
        for model in (module, *(value for value in kept if isinstance(value, nn.Module))):
            if _is_deferred(model):
                materialize(model, device)
    finally:
        module.trainer = trainer


def _is_deferred(model: nn.Module) -> bool:
    barren = set[int]()
    held = (tensor for module in model.modules() for _, _, tensor in held_tensors(module, barren))
    return any(handle_of(tensor) is not None for tensor in held)


def _refuse_empty_shards(model: nn.Module) -> None:
    empty = [
        name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor) and parameter.is_meta
    ]
    if empty:
        raise UninitializedError(
            f"{name_list(empty)} are shards without a value: the model was sharded inside `deferred()` or on the meta "
            "device. Construct it inside `deferred()`, leave that block, and call `fully_shard` inside `with "
            "nucleate_lightning.sharding(model):`."
        )
