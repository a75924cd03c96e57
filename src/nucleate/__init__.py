"""nucleate builds, loads and launches large PyTorch models. Each parameter is made once, in its final place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nucleate.accelerators import Accelerator as Accelerator
    from nucleate.integrations import Integration as Integration
    from nucleate.precision import Precision as Precision
    from nucleate.runtime import Runtime as Runtime
    from nucleate.seed import RandomState as RandomState
    from nucleate.seed import seed_everything as seed_everything
    from nucleate.strategies import Strategy as Strategy
    from nucleate.wrappers import is_wrapped as is_wrapped

__version__ = "0.1.0"

# The public names, and the modules that define them. A module is imported when a name is first used, so that
# `import nucleate` takes very little time.
_PUBLIC = {
    "Accelerator": "nucleate.accelerators",
    "Integration": "nucleate.integrations",
    "Precision": "nucleate.precision",
    "RandomState": "nucleate.seed",
    "Runtime": "nucleate.runtime",
    "Strategy": "nucleate.strategies",
    "is_wrapped": "nucleate.wrappers",
    "seed_everything": "nucleate.seed",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nucleate' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
