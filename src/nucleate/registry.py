"""The registries of plugins: names and their classes, from a table of built-ins and entry points of installed packages.

Listing names imports nothing; only `get` imports a class. Each plugin defines its own options, and a name stands for a
plugin with its default options.
"""

from __future__ import annotations

import difflib
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from nucleate.errors import ConfigurationError, PluginConflictError, PluginLoadError, PluginNotFoundError
from nucleate.fabric_objects import refuse_fabric_object
from nucleate.plugin import Named


@dataclass(frozen=True)
class Registry:
    """The plugins of one kind.

    Attributes:
        kind: The word for the kind in messages, such as `"precision"`.
        group: The entry point group that packages use, such as `"nucleate.precision"`.
        base: `"module:Class"` of the kind's base class.
        builtins: The `"module:Class"` of each built-in name.
        known: Names that optional packages offer, each with the command that installs the package.
    """

    kind: str
    group: str
    base: str
    builtins: Mapping[str, str]
    known: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def _installed(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in _entry_points(tuple(sys.path)).select(group=self.group):
            points = found.setdefault(point.name, [])
            # An editable install may be listed twice; the same target offered twice is not a conflict.
            if all(point.value != other.value for other in points):
                points.append(point)
        return found

    def names(self) -> list[str]:
        """Return every registered name, sorted, without importing a plugin."""
        return sorted({*self.builtins, *self._installed})

    def installed_names(self) -> list[str]:
        """Return the names that other distributions offer, sorted, without importing a plugin."""
        return sorted(self._installed)

    def get(self, name: str) -> type[Named]:
        """Import and return the class registered under `name`.

        Raises:
            PluginNotFoundError: No plugin has that name. The message suggests similar names and a package to install.
            PluginConflictError: Two distributions offer the name, or one offers a built-in's name.
            PluginLoadError: Importing the plugin failed, or it is not a plugin of this kind.
        """
        plugin, offer = self.load(name)
        if not (isinstance(plugin, type) and issubclass(plugin, self._base_class)):
            raise PluginLoadError(f"{self.kind} {name!r} from {offer} is {plugin!r}, not a subclass of {self.base}.")
        return plugin

    def load(self, name: str) -> tuple[Any, str]:
        """Import the object registered under `name`, of any kind.

        Returns:
            The object, and the distribution and target that offer it.

        Raises:
            PluginNotFoundError: No plugin has that name. The message suggests similar names and a package to install.
            PluginConflictError: Two distributions offer the name, or one offers a built-in's name.
            PluginLoadError: Importing the plugin failed.
        """
        points = self._installed.get(name, [])
        offers = [f"{_distribution(point)} ({point.value})" for point in points]
        if name in self.builtins:
            offers.insert(0, f"nucleate ({self.builtins[name]})")
        if len(offers) > 1:
            raise PluginConflictError(
                f"{self.kind} {name!r} is offered by {' and by '.join(offers)}. Uninstall one of them."
            )
        if not offers:
            raise PluginNotFoundError(self._not_found(name))
        target = points[0].value if points else self.builtins[name]
        try:
            module, _, attribute = target.partition(":")
            return getattr(import_module(module), attribute), offers[0]
        except Exception as error:
            raise PluginLoadError(
                f"{self.kind} {name!r} from {offers[0]} cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    def create(self, name: str) -> Named:
        """Build the plugin registered under `name` with its default options."""
        return self.get(name).from_name(name)

    def choose(self, choice: str | Named) -> Named:
        """Return a plugin as it is, or build the plugin that a name stands for.

        Args:
            choice: A name or a plugin of this kind.

        Raises:
            ConfigurationError: `choice` is neither a name nor a plugin of this kind. For a name, see `get`.
        """
        if isinstance(choice, str):
            return self.create(choice)
        if not isinstance(choice, self._base_class):
            refuse_fabric_object(choice, f"{self.kind}=...")
            raise ConfigurationError(
                f"{self.kind}={choice!r} is neither a name nor a {self._base_class.__name__}. "
                f"Names: {', '.join(self.names())}."
            )
        return choice

    @cached_property
    def _base_class(self) -> type[Named]:
        module, _, attribute = self.base.partition(":")
        base: type[Named] = getattr(import_module(module), attribute)
        return base

    def _not_found(self, name: str) -> str:
        message = f"no {self.kind} plugin named {name!r}."
        close = difflib.get_close_matches(name, sorted({*self.names(), *self.known}), n=3)
        if close:
            message += f" Did you mean {' or '.join(map(repr, close))}?"
        message += f" Installed: {', '.join(self.names())}."
        install = {self.known[hit] for hit in [name, *close] if hit in self.known and hit not in self.names()}
        if install:
            message += f" ({'; '.join(sorted(install))})"
        return message


@functools.cache
def _entry_points(path: tuple[str, ...]) -> Any:
    """Return the entry points of all groups that are installed on a path. One search serves all registries."""
    return entry_points()


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unknown distribution"


ACCELERATORS = Registry(
    kind="accelerator",
    group="nucleate.accelerators",
    base="nucleate.accelerators.base:Accelerator",
    builtins={
        "cpu": "nucleate.accelerators.cpu:CPUAccelerator",
        "cuda": "nucleate.accelerators.cuda:CUDAAccelerator",
        "mps": "nucleate.accelerators.generic:TorchAccelerator",
        "xpu": "nucleate.accelerators.generic:TorchAccelerator",
    },
)

PRECISIONS = Registry(
    kind="precision",
    group="nucleate.precision",
    base="nucleate.precision.base:Precision",
    builtins={
        "no-cast": "nucleate.precision.no_cast:NoCastPrecision",
        "32-true": "nucleate.precision.full:FullPrecision",
        "64-true": "nucleate.precision.full:FullPrecision",
        "bf16-true": "nucleate.precision.half:HalfPrecision",
        "16-true": "nucleate.precision.half:HalfPrecision",
        "bf16-mixed": "nucleate.precision.mixed:MixedPrecision",
        "16-mixed": "nucleate.precision.mixed:MixedPrecision",
    },
    known={
        f"bnb-{mode}": "pip install nucleate-bitsandbytes"
        for mode in ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training")
    },
)

STRATEGIES = Registry(
    kind="strategy",
    group="nucleate.strategies",
    base="nucleate.strategies.base:Strategy",
    builtins={
        "single_device": "nucleate.strategies.single_device:SingleDeviceStrategy",
        "ddp": "nucleate.strategies.ddp:DDPStrategy",
        "ddp_find_unused_parameters_false": "nucleate.strategies.ddp:DDPStrategy",
        "ddp_find_unused_parameters_true": "nucleate.strategies.ddp:DDPStrategy",
        "fsdp": "nucleate.strategies.fsdp:FSDPStrategy",
        "fsdp_cpu_offload": "nucleate.strategies.fsdp:FSDPStrategy",
        "hsdp": "nucleate.strategies.fsdp:FSDPStrategy",
        **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook"), "nucleate.strategies.ddp:DDPStrategy"),
    },
)

DIMENSIONS = Registry(
    kind="dimension",
    group="nucleate.dimensions",
    base="nucleate.dimensions.base:Dimension",
    builtins={
        "fully_shard": "nucleate.dimensions.fully_shard:FullyShard",
        "replicate": "nucleate.dimensions.replicate:Replicate",
        "tensor_parallel": "nucleate.dimensions.tensor:TensorParallel",
        "activation_checkpointing": "nucleate.dimensions.checkpointing:ActivationCheckpointing",
        "compile": "nucleate.dimensions.compiling:Compile",
    },
)
READERS = Registry(
    kind="reader",
    group="nucleate.readers",
    base="nucleate.checkpoint.readers.base:Reader",
    builtins={
        "safetensors": "nucleate.checkpoint.readers.safetensors:SafetensorsReader",
        "dcp": "nucleate.checkpoint.readers.dcp.dcp:DCPReader",
        "torch": "nucleate.checkpoint.readers.torch.torch_file:TorchReader",
    },
)

#: A writer's name is the name of its format.
WRITERS = Registry(
    kind="writer",
    group="nucleate.writers",
    base="nucleate.checkpoint.writers.base:Writer",
    builtins={
        "dcp": "nucleate.checkpoint.writers.dcp:DcpWriter",
        "safetensors": "nucleate.checkpoint.writers.safetensors:SafetensorsWriter",
        "torch": "nucleate.checkpoint.writers.torch_file:TorchFileWriter",
    },
)

#: An integration's name is the name of the library's top-level module.
INTEGRATIONS = Registry(
    kind="integration",
    group="nucleate.integrations",
    base="nucleate.integrations.base:Integration",
    builtins={
        "torch": "nucleate.integrations.torch_files:TorchFiles",
        "safetensors": "nucleate.integrations.safetensors_files:SafetensorsFiles",
        "lightning": "nucleate.integrations.lazy_tensors:LazyTensors",
        "lightning_fabric": "nucleate.integrations.lazy_tensors:LazyTensors",
    },
    known={"transformers": "pip install nucleate-transformers"},
)

#: A logger need not be a plugin: `Runtime` takes any object with `log_metrics(metrics, step)`.
LOGGERS = Registry(
    kind="logger",
    group="nucleate.loggers",
    base="nucleate.loggers.base:Logger",
    builtins={
        "csv": "nucleate.loggers.csv_logger:CSVLogger",
        "tensorboard": "nucleate.loggers.tensorboard:TensorBoardLogger",
        "wandb": "nucleate.loggers.wandb:WandbLogger",
        "mlflow": "nucleate.loggers.mlflow:MLFlowLogger",
    },
)

#: Callbacks of installed packages: classes, or functions that return one callback or a list. Any object is a callback.
CALLBACKS = Registry(kind="callback", group="nucleate.callbacks", base="builtins:object", builtins={})
