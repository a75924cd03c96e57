"""Objects of Lightning Fabric that stand where an object of nucleate must stand, and their counterparts here.

They are recognised by the module of their class. Lightning itself is never imported.
"""

from __future__ import annotations

from nucleate.errors import ConfigurationError

_PACKAGES = ("lightning", "lightning_fabric", "pytorch_lightning")
#: Advice by the name of Fabric's base class.
_COUNTERPARTS = {
    "Precision": "give the name of a precision: Runtime(precision={name!r})",
    "ClusterEnvironment": (
        "start the processes with torchrun, or give Runtime(plugins=...) a nucleate.cluster.Environment with the place "
        "of this process"
    ),
    "CheckpointIO": (
        "`save` and `load` take the names of formats. For a format of your own, give Runtime(plugins=...) a "
        "nucleate.checkpoint.Reader or a writer (nucleate.checkpoint.writers.Writer)"
    ),
    "Strategy": "use the class of the same purpose in nucleate.strategies, such as DDPStrategy or FSDPStrategy",
    "Accelerator": "give the name of the accelerator, such as Runtime(accelerator='gpu') or 'cpu'",
    "Logger": "give it to Runtime(loggers=...)",
}


def refuse_fabric_object(value: object, argument: str) -> None:
    """Refuse an object of Lightning Fabric or Lightning by the name of its counterpart here; others pass.

    Args:
        value: The object, or a class.
        argument: The argument that it was given for, for the message.

    Raises:
        ConfigurationError: A class of the object comes from Lightning.
    """
    cls = value if isinstance(value, type) else type(value)
    theirs = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in _PACKAGES]
    if not theirs:
        return
    kind = next((base.__name__ for base in theirs if base.__name__ in _COUNTERPARTS), None)
    advice = "nucleate has no counterpart of this class" if kind is None else _COUNTERPARTS[kind]
    name = getattr(value, "precision", None)
    advice = advice.format(name=name if isinstance(name, str) else "32-true")
    raise ConfigurationError(f"{argument}: {cls.__name__} belongs to {theirs[0].__module__}. Instead, {advice}.")
