"""Fabric's names on nucleate, so that an unedited script of Lightning Fabric runs.

Importing this module does nothing. `install()` puts the names in place in this process. The command
`python -m nucleate.compat.fabric script.py` does the same before it runs a script.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nucleate.compat.finder import StandInFinder
from nucleate.compat.names import ROOTS
from nucleate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nucleate.compat.runtime import Fabric as Fabric

__all__ = ["Fabric", "install", "main", "uninstall"]


def __getattr__(name: str) -> Any:
    if name == "Fabric":
        from nucleate.compat.runtime import Fabric

        return Fabric
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def install(force: bool = False) -> None:
    """Put Fabric's names in place: `import lightning`, `lightning.fabric` and their modules find nucleate.

    A name that nucleate does not carry raises an error with the name when a script takes it.

    Args:
        force: Replace an installed lightning in this process. Names that a module took from it before stay there.

    Raises:
        UsageError: The real lightning is installed or imported, and `force` is False.
    """
    if _installed() is not None:
        return
    real = _real()
    if real and not force:
        raise UsageError(
            f"the real package {real[0]!r} is installed, and its names would be hidden from this process. Call "
            "install(force=True) to hide them."
        )
    finder = StandInFinder()
    finder.hide()
    sys.meta_path.insert(0, finder)


def uninstall() -> None:
    """Take Fabric's names away again, and bring an imported lightning back. Without `install` it does nothing."""
    finder = _installed()
    if finder is not None:
        sys.meta_path.remove(finder)
        finder.show()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script, or with `-m` a module, after `install(force=True)`.

    Args:
        arguments: The command line after the name of this program. None takes this process's.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nucleate.compat.fabric",
        description="Run an unedited script of Lightning Fabric on nucleate.",
    )
    parser.add_argument("-m", dest="as_module", action="store_true", help="the name is one of a module")
    parser.add_argument("script", help="a Python file, or with -m a module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of the script")
    chosen = parser.parse_args(arguments)
    if not chosen.as_module and not Path(chosen.script).is_file():
        parser.error(f"there is no file {chosen.script!r}")
    install(force=True)
    sys.argv = [chosen.script, *chosen.arguments]
    if chosen.as_module:
        # As `python -m` does: the working directory comes first.
        sys.path[0] = str(Path.cwd())
        runpy.run_module(chosen.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(chosen.script).resolve().parent)
        runpy.run_path(chosen.script, run_name="__main__")


def _installed() -> StandInFinder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, StandInFinder)), None)


def _real() -> list[str]:
    """Return the roots that are importable without the stand-in."""
    return [root for root in ROOTS if root in sys.modules or PathFinder.find_spec(root) is not None]


if __name__ == "__main__":
    main()
