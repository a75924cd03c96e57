"""The finder of stand-in modules: it answers imports of Fabric's modules with the names of nucleate."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from nucleate.compat import names
from nucleate.compat.names import ABSENT, MODULES, ROOTS


class StandInModule(ModuleType):
    """A module whose names lead to objects of nucleate, which are imported when a script takes them."""

    def __getattr__(self, name: str) -> Any:
        targets = MODULES[self.__name__]
        if name in targets:
            module, _, attribute = targets[name].partition(":")
            value = getattr(import_module(module), attribute) if attribute else import_module(module)
            self.__dict__[name] = value
            return value
        if f"{self.__name__}.{name}" in MODULES:
            return import_module(f"{self.__name__}.{name}")
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        hint = ABSENT.get(name, "docs/from-fabric.md lists the names that nucleate carries.")
        raise AttributeError(f"nucleate's stand-in for {self.__name__!r} does not carry {name!r}. {hint}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES[self.__name__]})


class StandInFinder(MetaPathFinder, Loader):
    """A finder and loader of the modules in `names.MODULES`. It hides all other modules below `names.ROOTS`."""

    def __init__(self) -> None:
        self._hidden: dict[str, ModuleType] = {}

    def hide(self) -> None:
        """Forget the real modules that this process has imported; `show` brings them back."""
        self._hidden = _forget_modules()

    def show(self) -> None:
        """Forget the stand-in modules, and bring the real modules back."""
        _forget_modules()
        sys.modules.update(self._hidden)
        self._hidden = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a stand-in module, or None for a module of another package.

        Raises:
            ModuleNotFoundError: nucleate does not carry this module.
        """
        if fullname.partition(".")[0] not in ROOTS:
            return None
        if fullname not in MODULES:
            raise ModuleNotFoundError(
                f"nucleate's stand-in does not carry the module {fullname!r}. docs/from-fabric.md lists the names that "
                "nucleate carries.",
                name=fullname,
            )
        # A stand-in without modules below it is a package too: an import below it then gets the message above.
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make an empty stand-in."""
        return StandInModule(spec.name, "A stand-in by nucleate.")

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: names are looked up when a script takes them."""
        module.__all__ = sorted(MODULES[module.__name__])  # type: ignore[attr-defined]
        # Python's message about a name that an import does not find shows this file.
        module.__file__ = names.__file__


def _forget_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in ROOTS]
    return {name: sys.modules.pop(name) for name in names}
