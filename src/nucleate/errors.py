"""Every error that nucleate raises on purpose, drawn once.

```
NucleateError
├── ConfigurationError (ValueError)             arguments that are wrong or contradict each other
│   ├── PluginNotFoundError (LookupError)       no plugin of that name
│   ├── PluginConflictError                     one name offered by two distributions
│   └── PluginLoadError (ImportError)           a plugin is there, but importing it failed
├── MissingDependencyError (ImportError)        an extra is not installed
├── UsageError (RuntimeError)                   a method called at the wrong time or on the wrong object
├── NonFiniteGradientError (ArithmeticError)    gradients are NaN or infinite
├── ConversionError (ValueError)                a weight that cannot be quantized, such as one with a NaN
├── VerificationError (RuntimeError)            `verify` found a value that its recipe does not make
├── DeferredError (RuntimeError)                about tensors that are still recipes
│   ├── DeferredUseError                        computed with before `setup`
│   ├── DeferredEditError                       edited where no recorder was listening
│   ├── UninitializedError                      nothing ever wrote the tensor
│   └── ReplayError                             a replay disagrees with its record
├── DistributedError (RuntimeError)             the ranks do not agree, or one of them failed
│   ├── RankFailedError                         another rank raised first
│   └── RankDisagreementError                   ranks built or hold different things
└── CheckpointError (RuntimeError)
    ├── CheckpointNotFoundError (FileNotFoundError)
    ├── CheckpointKeyError (LookupError)        missing or unexpected keys
    └── ShapeMismatchError (ValueError)         a tensor of another shape
```

Each class also inherits the builtin that a caller would catch without knowing nucleate. A message says
what is wrong, the value, what is allowed, and what to do.
"""

from collections.abc import Iterable


class NucleateError(Exception):
    """The root: catch this for everything that nucleate raises on purpose."""


class ConfigurationError(NucleateError, ValueError):
    """An argument is wrong, or two arguments contradict each other."""


class PluginNotFoundError(ConfigurationError, LookupError):
    """No plugin of that kind has that name."""


class PluginConflictError(ConfigurationError):
    """Two installed distributions offer the same plugin name."""


class PluginLoadError(ConfigurationError, ImportError):
    """The plugin is registered, but it cannot be imported."""


class MissingDependencyError(NucleateError, ImportError):
    """A package that this feature needs is not installed."""


class UsageError(NucleateError, RuntimeError):
    """A method was called at the wrong time or on the wrong object."""


class NonFiniteGradientError(NucleateError, ArithmeticError):
    """Gradients are NaN or infinite where finite ones are needed."""


class ConversionError(NucleateError, ValueError):
    """A tensor cannot be converted: its values or its shape do not allow it."""


class VerificationError(NucleateError, RuntimeError):
    """A value that was set up is not what its recipe makes, or not the same on every rank that holds it."""


class DeferredError(NucleateError, RuntimeError):
    """Something is wrong with tensors that are still recipes."""


class DeferredUseError(DeferredError):
    """A deferred tensor was computed with before `setup` gave it a value."""


class DeferredEditError(DeferredError):
    """A deferred tensor was edited where no recorder was listening."""


class UninitializedError(DeferredError):
    """A parameter or buffer has no value: nothing ever wrote it."""


class ReplayError(DeferredError):
    """A replayed operation does not do what its record says."""


class DistributedError(NucleateError, RuntimeError):
    """The ranks do not agree, or one of them failed."""


class RankFailedError(DistributedError):
    """Another rank raised first; the message carries its traceback."""


class RankDisagreementError(DistributedError):
    """The ranks built, or hold, different things where they must be equal."""


class CheckpointError(NucleateError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no whole checkpoint at that path."""


class CheckpointKeyError(CheckpointError, LookupError):
    """The checkpoint lacks keys that are needed, or has keys that nobody asked for."""


class ShapeMismatchError(CheckpointError, ValueError):
    """A tensor has another shape in the checkpoint than in the model."""


def name_list(names: Iterable[str], limit: int = 10) -> str:
    """Join names for a message, cut at `limit` with a count of the rest.

    >>> name_list(["a", "b", "c"], limit=2)
    'a, b, ... (3 in all)'
    """
    listed = list(names)
    if len(listed) <= limit:
        return ", ".join(listed)
    return f"{', '.join(listed[:limit])}, ... ({len(listed)} in all)"
