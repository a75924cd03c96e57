"""The error classes of nucleate: every error that it raises on purpose.

```
NucleateError
├── ConfigurationError (ValueError)             arguments that are wrong or contradict each other
│   ├── PluginNotFoundError (LookupError)       no plugin has that name
│   ├── PluginConflictError                     two distributions offer one name
│   └── PluginLoadError (ImportError)           a registered plugin cannot be imported
├── MissingDependencyError (ImportError)        an extra is not installed
├── UsageError (RuntimeError, ValueError, TypeError)  a method called at the wrong time or on the wrong object
├── DtypeMismatchError (RuntimeError, ValueError)  forward met a tensor of another dtype than the precision's
├── NonFiniteGradientError (ArithmeticError)    gradients are NaN or infinite
├── ConversionError (ValueError)                a weight cannot be quantized, for example one with a NaN
├── VerificationError (RuntimeError)            `verify` found a value that differs from its recipe
├── DeferredError (RuntimeError)                something is wrong with tensors that are still deferred
│   ├── DeferredUseError                        a computation used a deferred tensor before `setup`
│   ├── DeferredEditError                       nothing recorded an edit of a deferred tensor
│   ├── UninitializedError                      nothing wrote the tensor
│   └── ReplayError                             a replayed operation differs from the recorded one
├── DistributedError (RuntimeError)             the ranks do not agree, or one of them failed
│   ├── RankFailedError                         another rank raised first
│   │   └── RankExitError (SystemExit)          a started rank ended with an exit code of its own
│   └── RankDisagreementError                   ranks built different models or hold different values
└── CheckpointError (RuntimeError)
    ├── CheckpointNotFoundError (FileNotFoundError)
    ├── CheckpointUnreadableError               nothing is damaged, but nucleate does not read this kind
    ├── CheckpointKeyError (KeyError)           missing or unexpected keys
    └── ShapeMismatchError (ValueError)         a tensor has another shape
```

Each class also inherits the builtin exception that a caller would catch without knowing nucleate. A message states the
fault, the value, the allowed values and the remedy.
"""

from collections.abc import Iterable


class NucleateError(Exception):
    """The root of all errors that nucleate raises on purpose."""


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


class UsageError(NucleateError, RuntimeError, ValueError, TypeError):
    """A method was called at the wrong time or on the wrong object.

    Scripts written for Lightning Fabric expect one of these three builtin exceptions, depending on the method.
    """


class DtypeMismatchError(NucleateError, RuntimeError, ValueError):
    """Forward combined a tensor that the precision does not cast with tensors of the precision's dtype.

    torch raises RuntimeError for such operations, and its recurrent layers raise ValueError.
    """


class NonFiniteGradientError(NucleateError, ArithmeticError):
    """Gradients are NaN or infinite where finite ones are needed."""


class ConversionError(NucleateError, ValueError):
    """A tensor cannot be converted: its values or its shape do not allow it."""


class VerificationError(NucleateError, RuntimeError):
    """A value differs from the value that its recipe makes, or differs between the ranks that hold it."""


class DeferredError(NucleateError, RuntimeError):
    """Something is wrong with tensors that are still deferred."""


class DeferredUseError(DeferredError):
    """A computation used a deferred tensor before `setup` gave it a value."""


class DeferredEditError(DeferredError):
    """A deferred tensor was edited, and nothing recorded the edit."""


class UninitializedError(DeferredError):
    """A parameter or buffer has no value: nothing wrote it."""


class ReplayError(DeferredError):
    """A replayed operation makes a tensor of another dtype or shape than recorded."""


class DistributedError(NucleateError, RuntimeError):
    """The ranks do not agree, or one of them failed."""


class RankFailedError(DistributedError):
    """Another rank raised first; the message carries its traceback."""


class RankExitError(RankFailedError, SystemExit):
    """A rank that `launch` started was killed, or ended with an exit code of its own.

    Where nobody catches it, this process ends with the same exit code.

    Attributes:
        code: The exit code: 128 and the number of the signal for a rank that was killed.
    """


class RankDisagreementError(DistributedError):
    """The ranks built different models, or hold different values, where they must be equal."""


class CheckpointError(NucleateError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """The path does not hold a complete checkpoint."""


class CheckpointUnreadableError(CheckpointError):
    """Nothing is known to be damaged, but nucleate does not read files or values of this kind."""


class CheckpointKeyError(CheckpointError, KeyError):
    """The checkpoint lacks required keys, or has unexpected keys."""

    def __str__(self) -> str:
        """Return the message as it is. KeyError would return its repr."""
        return Exception.__str__(self)


class ShapeMismatchError(CheckpointError, ValueError):
    """A tensor has another shape in the checkpoint than in the model."""


# Names in damaged files may have any length.
_MAX_NAME = 300


def shortened(text: str, limit: int = 1000) -> str:
    """Return a text for a message, without its middle if it is longer than `limit`.

    >>> shortened("abcdefghijkl", limit=9)
    'abc...jkl'
    """
    kept = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[:kept]}...{text[-kept:]}"


def name_list(names: Iterable[str], limit: int = 10) -> str:
    """Join names for a message; beyond `limit` names, give the count of all names instead of the others.

    >>> name_list(["a", "b", "c"], limit=2)
    'a, b, ... (3 in all)'
    """
    listed = [shortened(name, _MAX_NAME) for name in names]
    if len(listed) <= limit:
        return ", ".join(listed)
    return f"{', '.join(listed[:limit])}, ... ({len(listed)} in all)"
