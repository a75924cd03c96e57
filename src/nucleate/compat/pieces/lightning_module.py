"""The base class of modules that bring their training step and their optimizer, for a script's own trainer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from nucleate.compat.pieces.attribute_dict import AttributeDict
from nucleate.errors import UsageError

_HOOKS = (
    *("on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_before_zero_grad"),
    *("on_validation_start", "on_validation_end", "on_validation_epoch_start", "on_validation_epoch_end"),
    *("on_validation_batch_start", "on_validation_batch_end"),
    *("on_test_start", "on_test_end", "on_test_epoch_start", "on_test_epoch_end"),
    *("on_test_batch_start", "on_test_batch_end"),
)


class LightningModule(nn.Module):
    """A module whose steps and hooks a script's own trainer calls. The hooks do nothing by default.

    There is no Trainer here: the attribute `trainer` is refused. `log` and `log_dict` write by the `Fabric` that has
    set the module up.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # In `__dict__`, so that nothing takes it for a part of the model.
        self.__dict__["_fabric"] = None
        self._hparams = AttributeDict()

    @property
    def fabric(self) -> Any:
        """The `Fabric` that has set this module up, or None."""
        return self.__dict__["_fabric"]

    @fabric.setter
    def fabric(self, fabric: Any) -> None:
        self.__dict__["_fabric"] = fabric

    @property
    def trainer(self) -> Any:
        """Refused.

        Raises:
            UsageError: Always.
        """
        raise UsageError("this module has no Trainer. Run the script without the stand-in if it uses Lightning's.")

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first parameter."""
        return next((parameter.dtype for parameter in self.parameters()), torch.get_default_dtype())

    @property
    def hparams(self) -> AttributeDict:
        """The settings that `save_hyperparameters` has kept."""
        return self._hparams

    def save_hyperparameters(self, *names: str, ignore: str | list[str] | tuple[str, ...] = ()) -> None:
        """Keep arguments of the constructor that calls this method as `hparams`.

        Args:
            names: The names of the arguments; none means all.
            ignore: Arguments to leave out.
        """
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        given = {} if caller is None else inspect.getargvalues(caller)._asdict()
        values = given.get("locals", {})
        left_out = {ignore} if isinstance(ignore, str) else set(ignore)
        taken = names or [name for name in given.get("args", ()) if name != "self"]
        self._hparams.update({name: values[name] for name in taken if name not in left_out})
        for name, value in values.get(given.get("keywords") or "", {}).items():
            if not names and name not in left_out:
                self._hparams[name] = value

    def log(self, name: str, value: Any, **_: Any) -> None:
        """Write a metric by the loggers of the `Fabric`."""
        self.log_dict({name: value})

    def log_dict(self, dictionary: dict[str, Any], **_: Any) -> None:
        """Write metrics by the loggers of the `Fabric`."""
        if self.fabric is not None:
            self.fabric.log_dict(dictionary)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only."""
        if self.fabric is not None:
            self.fabric.print(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch."""

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Judge a batch of the validation data."""

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Judge a batch of the test data."""

    def predict_step(self, batch: Any, *_: Any, **__: Any) -> Any:
        """Return the predictions for a batch."""
        return self(batch)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, or what the script's trainer expects."""

    def on_validation_model_eval(self) -> None:
        """Switch to evaluation."""
        self.eval()

    def on_validation_model_train(self) -> None:
        """Switch to training."""
        self.train()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a scheduler, by the metric if there is one."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)


def _hook(name: str) -> Any:
    def hook(self: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    hook.__name__ = name
    hook.__qualname__ = f"LightningModule.{name}"
    return hook


for _name in _HOOKS:
    setattr(LightningModule, _name, _hook(_name))


def is_overridden(method_name: str, instance: object | None = None, parent: type | None = None) -> bool:
    """Return whether the class of an object has a method of its own in place of its base's.

    Args:
        method_name: The name of the method.
        instance: The object.
        parent: The base; None means `LightningModule`.
    """
    if instance is None:
        return False
    base = LightningModule if parent is None else parent
    own, theirs = getattr(type(instance), method_name, None), getattr(base, method_name, None)
    return own is not None and own is not theirs
