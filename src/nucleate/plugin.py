"""The base classes of plugins: the contract of every plugin, and that of accelerators, precisions and strategies.

A plugin has a name and can be built from it. The three plugins of a `Runtime` also have two methods:
`module_init_context()` surrounds the model's constructor, and `setup(model)` receives the constructed model. The base
class of each kind adds the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    import torch

    from nucleate.cluster.environment import Environment


@dataclass(frozen=True, slots=True)
class Composition:
    """The parts of a `Runtime`. Each plugin sees them and can refuse parts that it does not work with.

    Attributes:
        accelerator: The accelerator plugin.
        precision: The precision plugin.
        strategy: The strategy plugin.
        environment: The place of this process among all processes.
        device: The device of this process.
    """

    accelerator: Plugin
    precision: Plugin
    strategy: Plugin
    environment: Environment
    device: torch.device


class Named(ABC):  # noqa: B024 - each kind adds its own abstract methods
    """A plugin that is registered under a name.

    Subclasses are final: a plugin implements the base class of its kind and does not extend another plugin.
    """

    #: The name shown in messages; set by `from_name`, or by the class.
    name: str = ""
    #: The kind of plugin: "accelerator", "precision", "strategy", "integration", "reader" or "writer".
    kind: ClassVar[str] = ""

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the plugin that is registered under `name`, with its default options.

        Args:
            name: The registered name, which may carry a variant (`"bf16-mixed"`).
        """
        plugin = cls()
        plugin.name = name
        return plugin

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


class Plugin(Named):
    """One swappable part of `Runtime`."""

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return the context in which a model is constructed."""

    @abstractmethod
    def setup(self, model: Any) -> Any:
        """Prepare the constructed model for this plugin's purpose, and return it."""

    def check(self, composition: Composition) -> None:
        """Refuse a composition that cannot work. By default, do nothing.

        Args:
            composition: The parts that `Runtime` was given.

        Raises:
            ConfigurationError: This plugin does not work with the others.
        """
