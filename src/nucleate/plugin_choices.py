"""The plugins that a user gives to `Runtime`, sorted by their kinds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Self, TypeAlias

from nucleate.cluster.environment import Environment
from nucleate.errors import ConfigurationError
from nucleate.fabric_objects import refuse_fabric_object
from nucleate.integrations.base import Integration
from nucleate.plugin import Named
from nucleate.precision.base import Precision
from nucleate.registry import INTEGRATIONS, PRECISIONS

if TYPE_CHECKING:
    from nucleate.checkpoint.readers import Reader
    from nucleate.checkpoint.writers import Writer

#: One item of `Runtime(plugins=...)`. A name is the name of an integration.
PluginInput: TypeAlias = "str | Precision | Environment | Reader | Writer | Integration"


@dataclass(frozen=True, kw_only=True)
class PluginChoices:
    """The plugins of one `Runtime`, by kind.

    Attributes:
        precision: The precision, from `plugins` or from its own argument.
        environment: The place of this process, or None to read it from the launcher's variables.
        readers: Readers of checkpoints that come before the installed ones.
        writers: Writers of checkpoints that come before the installed ones.
        integrations: The integrations and names of integrations, or None without one among the plugins.
    """

    precision: str | int | Precision | None
    environment: Environment | None
    readers: tuple[Reader, ...]
    writers: tuple[Writer, ...]
    integrations: tuple[str | Integration, ...] | None

    @classmethod
    def of(
        cls, plugins: PluginInput | Iterable[PluginInput] | None, precision: str | int | Precision | None = None
    ) -> Self:
        """Sort the plugins.

        Args:
            plugins: The argument of `Runtime`: None, one plugin, or several.
            precision: The argument of `Runtime`.

        Raises:
            ConfigurationError: An item is not a plugin of these kinds, or two of them would do the same thing.
        """
        found: dict[str, list[Any]] = {kind: [] for kind in _KINDS}
        for item in _listed(plugins):
            kind = _kind_of(item)
            if kind not in found:
                _refuse(item)
            found[kind].append(item)
        _refuse_two("precision", found["precision"], precision)
        _refuse_two("environment", found["environment"], None)
        for kind in ("reader", "writer"):
            _check_names(kind, found[kind])
        return cls(
            precision=found["precision"][0] if found["precision"] else precision,
            environment=found["environment"][0] if found["environment"] else None,
            readers=tuple(found["reader"]),
            writers=tuple(found["writer"]),
            integrations=tuple(found["integration"]) or None,
        )


_KINDS = ("precision", "environment", "reader", "writer", "integration")


def _kind_of(item: object) -> str:
    if isinstance(item, str):
        return "" if item in PRECISIONS.names() and item not in INTEGRATIONS.names() else "integration"
    if isinstance(item, Environment):
        return "environment"
    # The kind, not the class: the classes of readers and writers need not be imported.
    return item.kind if isinstance(item, Named) else ""


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    if _kind_of(plugins) or isinstance(plugins, (str, type)) or not isinstance(plugins, Iterable):
        return [plugins]
    return list(plugins)


def _refuse(item: object) -> NoReturn:
    refuse_fabric_object(item, "plugins=...")
    other = "precision" if isinstance(item, str) else getattr(item, "kind", "")
    advice = f" Give it to Runtime({other}=...)." if other in ("accelerator", "strategy", "precision") else ""
    raise ConfigurationError(
        f"plugins has {item!r}, which is not a plugin of these kinds: a Precision, an Environment, a Reader, a Writer, "
        f"an Integration or the name of one.{advice}"
    )


def _refuse_two(kind: str, found: Sequence[object], argument: object) -> None:
    if found and argument is not None:
        raise ConfigurationError(
            f"plugins has the {kind} {found[0]!r}, and {kind}={argument!r} is given too. Give one of them."
        )
    if len(found) > 1:
        raise ConfigurationError(f"plugins has {len(found)} plugins of the kind {kind}: {found!r}. Give one.")


def _check_names(kind: str, found: Sequence[Reader | Writer]) -> None:
    names = [plugin.name for plugin in found]
    for plugin, name in zip(found, names, strict=True):
        if not name:
            raise ConfigurationError(
                f"the {kind} {plugin!r} in plugins has no name: give its class one (`name = ...`)."
            )
        if names.count(name) > 1:
            raise ConfigurationError(f"plugins has {names.count(name)} {kind}s named {name!r}. Give one.")
