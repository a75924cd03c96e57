"""The class `Runtime`: an accelerator, a precision and a strategy, and the methods that a training script calls.

`runtime` takes the arguments. The methods are inherited, each group from a file of its own. `building` starts the
processes, constructs models and sets them up. `training` has the steps of a training loop. `ranks` communicates between
the processes. `logs` writes metrics. `checkpoints` saves and loads. `parts` has the attributes that all of them use.

The runtime looks names up, combines the three plugins and decides the order of the steps. It does not know any concrete
plugin. Strategies and precisions decide how they carry out a step.
"""

from nucleate.runtime.runtime import Runtime

__all__ = ["Runtime"]
