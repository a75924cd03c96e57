"""The contracts: what every plugin has, and what every accelerator, precision and strategy keeps besides.

A plugin has a name and is made from it. Those that `Runtime` is composed of have two methods: `module_init_context()`
surrounds the model's constructor, `setup(model)` receives the constructed model. This file decides nothing else; what
each kind adds stands in its base class.
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
    """What `Runtime` put together, shown to each plugin so that it can refuse what does not fit.

    Attributes:
        accelerator: The accelerator plugin.
        precision: The precision plugin.
        strategy: The strategy plugin.
        environment: Which process this is, of how many.
        device: The device of this process.
    """

    accelerator: Plugin
    precision: Plugin
    strategy: Plugin
    environment: Environment
    device: torch.device


class Named(ABC):  # noqa: B024 - each kind says what is abstract
    """What is registered under a name.

    Subclasses are final: a plugin implements its kind's base, it does not extend another plugin.
    """

    #: The name shown in messages; set by `from_name`, or by the class.
    name: str = ""
    #: Which kind of plugin this is: "accelerator", "precision", "strategy", "integration", "reader" or
    #: "writer".
    kind: ClassVar[str] = ""

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Build the plugin that the registry's `name` stands for, with its default options.

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
        """Take the constructed model and return it ready for this plugin's purpose."""

    def check(self, composition: Composition) -> None:
        """Refuse a composition that cannot work. Does nothing by default.

        Args:
            composition: The parts that `Runtime` was given.

        Raises:
            ConfigurationError: This plugin does not work with the others.
        """
