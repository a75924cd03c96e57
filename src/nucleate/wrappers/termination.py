"""The end of a training loop after SIGTERM: the last save is repeated, or a function is called, and the process ends.

`cluster/sigterm.py` lets all ranks agree on the last step. This file decides where in the loop the state is whole. The
end of `optimizer.step()` is too early: the script has yet to step its scheduler and to count. So the end comes when the
loop asks the runtime's loader for the next batch, or, in a loop without one, when the model's next forward begins.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, final

import torch
from torch import nn
from torch.optim import Optimizer

from nucleate.cluster.communicator import Communicator
from nucleate.errors import ConfigurationError, UsageError, name_list
from nucleate.wrappers.deliveries import Deliveries, Delivery

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from nucleate.cluster.sigterm import Sigterm

P = ParamSpec("P")
T = TypeVar("T")

#: The number of further steps after which the end no longer waits for an optimizer or a loader.
_PATIENCE = 100


@dataclass(eq=False)
class _Saved:
    """A save, which can be repeated.

    Attributes:
        again: Saves, given the path, the state, and the arguments.
        path: The path.
        state: A list with the state as its only item.
        num_steps: The number of steps before it.
        counts: The integers of the state at that time, by name.
        is_rebuilt: Whether the script makes a new dict with other integers for each save.
        is_checked: Whether a step after it has looked for integers that nobody can change.
    """

    again: Callable[[Any, Any], Any]
    path: Any
    state: list[Any]
    num_steps: int
    counts: dict[str, int] = field(default_factory=dict)
    is_rebuilt: bool = False
    is_checked: bool = False

    @property
    def stale(self) -> list[str]:
        """The names of integers in the state that the script cannot have changed since the save."""
        is_lost = hasattr(sys, "getrefcount") and _num_holders(self.state) <= _num_holders([object()])
        return list(self.counts) if self.is_rebuilt or is_lost else []

    @property
    def trains(self) -> bool:
        """Whether the state has an optimizer."""
        return any(True for _ in _optimizers(self.state[0]))


@final
class Termination:
    """The reaction of a runtime to SIGTERM.

    Args:
        action: The argument `on_sigterm` of the `Runtime`.
        deliveries: The loops over the runtime's loaders.

    Raises:
        ConfigurationError: The action is not None, `"save"` or a function of one argument.
    """

    def __init__(self, action: Any, deliveries: Deliveries) -> None:
        _check(action)
        self._action = action
        self._deliveries = deliveries
        self._runtime: Any = None
        self._communicator: Communicator | None = None
        self._signal: Sigterm | None = None
        self._saved: _Saved | None = None
        self._optimizers: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # The optimizer that has stepped last, and the one that stepped last before a save: that ends an iteration.
        self._stepped: weakref.ref[Optimizer] | None = None
        self._closing: weakref.ref[Optimizer] | None = None
        self._num_overdue = 0
        # After the last step: the loops that ran then, the random states, and the hook on the next forward.
        self._loops: list[Delivery] = []
        self._random: dict[str, Any] = {}
        self._hook: RemovableHandle | None = None
        deliveries.termination = self if action is not None else None

    def start(self, runtime: Any, communicator: Communicator) -> None:
        """Listen for the signal. Every rank calls this method.

        Args:
            runtime: The argument of the function that is called at the end.
            communicator: The communicator of all ranks.

        Raises:
            UsageError: This is not the main thread.
        """
        if self._action is None:
            return
        if threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "on_sigterm needs the main thread of the process, which alone can handle signals. Launch the runtime "
                "there, or leave on_sigterm out."
            )
        from nucleate.cluster.sigterm import Sigterm

        self._runtime, self._communicator = runtime, communicator
        name = communicator.broadcast(uuid.uuid4().hex)
        self._signal = Sigterm(communicator.rank, communicator.world_size, name, self._refusal)
        self._signal.start()

    @contextmanager
    def saving(self, again: Callable[[Any, Any], Any], path: Any, state: Any) -> Iterator[None]:
        """Surround a save, and remember it.

        Args:
            again: Repeats the save, given the path and the state.
            path: The path.
            state: The state.
        """
        if self._action != "save" or self._signal is None:
            yield
            self._closing = self._stepped
            return
        before = self._saved
        saved = _Saved(again, path, [state], self._signal.num_steps, _counts(state))
        if before is None or saved.trains or not before.trains:
            if before is not None:
                saved.is_rebuilt = _is_rebuilt(before, saved)
            self._saved = saved
        try:
            yield
        except BaseException:
            self._saved = before
            raise
        self._closing = self._stepped

    def step_ended(self, optimizer: Optimizer) -> None:
        """Note the end of a step of an optimizer. Every rank calls this method.

        Args:
            optimizer: The user's optimizer.

        Raises:
            RankFailedError: The signal came, and the ranks could not agree on the last step.
        """
        if self._signal is None:
            return
        self._optimizers.add(optimizer)
        self._stepped = weakref.ref(optimizer)
        if self._saved is not None and not self._saved.is_checked:
            self._warn_of(self._saved)
        if not self._signal.step_ended():
            return
        closing = None if self._closing is None else self._closing()
        self._num_overdue += 1
        if self._hook is None and (closing is None or closing is optimizer or self._num_overdue > _PATIENCE):
            self._await_end()

    def batch_asked(self, delivery: Delivery) -> None:
        """End this process if the loop has made its last step. A loop calls this when it asks for its next batch.

        Args:
            delivery: The iteration of the loader.

        Raises:
            SystemExit: The loop has made its last step.
        """
        if self._hook is not None and delivery in self._loops:
            self._end()

    def _refusal(self) -> str | None:
        """Return the reason why the signal ends this process at once, or None."""
        if self._action == "save" and self._saved is None:
            return (
                "on_sigterm='save' repeats the last runtime.save, and there was none yet. Nothing is saved. Call "
                "runtime.save early, or pass a function as on_sigterm."
            )
        return None

    def _warn_of(self, saved: _Saved) -> None:
        saved.is_checked = True
        assert self._communicator is not None
        if self._communicator.rank == 0 and saved.stale:
            shown = name_list(f"{name}={saved.counts[name]}" for name in saved.stale)
            warnings.warn(
                f"on_sigterm='save' cannot repeat this save, because the script made the dict for one save only: "
                f"{shown} could not follow the training. At SIGTERM nothing would be saved. Keep one dict, and change "
                "its entries as the training goes on, as in state['step'] = step. Or pass a function as on_sigterm.",
                stacklevel=4,
            )

    def _await_end(self) -> None:
        """Let the process end at the place where the state is whole."""
        # Imported here: only a process that ends needs it.
        from nucleate.seed import RandomState

        self._loops = self._deliveries.open()
        self._random = RandomState().state_dict()
        self._hook = nn.modules.module.register_module_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if any(loop.is_open for loop in self._loops) and self._num_overdue <= _PATIENCE:
            return
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        if any(id(parameter) in trained for parameter in module.parameters()):
            from nucleate.seed import RandomState

            # The script may have drawn the next batch, and draws it again when the run goes on.
            RandomState().load_state_dict(self._random)
            self._end()

    def _end(self) -> None:
        from nucleate.cluster.sigterm import EXIT_CODE

        assert self._hook is not None
        assert self._signal is not None
        assert self._communicator is not None
        self._hook.remove()
        self._signal.end()
        done = self._repeat() if self._action == "save" else self._action(self._runtime)
        if self._communicator.rank == 0:
            text = f" {done}" if self._action == "save" else ""
            sys.stderr.write(f"SIGTERM ended this run after {self._signal.num_steps} steps.{text}\n")
            sys.stderr.flush()
        raise SystemExit(EXIT_CODE)

    def _repeat(self) -> str:
        """Save as last time, and return a sentence about it."""
        saved = self._saved
        assert saved is not None
        assert self._signal is not None
        assert self._communicator is not None
        if saved.num_steps == self._signal.num_steps:
            return f"The checkpoint {saved.path} has its last state."
        stale = self._communicator.broadcast(saved.stale)
        if stale:
            return f"Nothing was saved, because {name_list(stale)} of the last save could not follow the training."
        handle = saved.again(saved.path, saved.state[0])
        if handle is not None:
            handle.wait()
        return f"It was saved as {saved.path}."


def repeatable(save: Callable[P, T]) -> Callable[P, T]:
    """Return the method `save` of a runtime, which the runtime can repeat at SIGTERM.

    Args:
        save: The method. It takes a path, a state, and more.
    """

    def with_parts(runtime: Any, path: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        def again(path: Any, state: Any) -> Any:
            return save(runtime, path, state, *args, **kwargs)

        runtime.launch()
        with runtime._termination.saving(again, path, state):
            return again(path, state)

    @functools.wraps(save)
    def saving(*args: P.args, **kwargs: P.kwargs) -> T:
        result: T = with_parts(*args, **kwargs)
        return result

    return saving


def _check(action: Any) -> None:
    if action is None or action == "save":
        return
    if not callable(action):
        raise ConfigurationError(
            f"on_sigterm={action!r} must be None, 'save', or a function that gets the runtime and saves."
        )
    try:
        inspect.signature(action).bind(None)
    except TypeError as error:
        raise ConfigurationError(
            f"on_sigterm={action!r} must take one argument, the runtime: {error}. For example: "
            "on_sigterm=lambda runtime: runtime.save('last', state)"
        ) from None
    except ValueError:
        return  # A function of C without a signature.


def _counts(state: Any) -> dict[str, int]:
    """Return the integers of a state by name. Counters of steps and epochs are among them."""
    return {name: value for name, value in state.items() if type(value) is int} if isinstance(state, dict) else {}


def _is_rebuilt(before: _Saved, saved: _Saved) -> bool:
    """Return whether the script made a new dict with other integers, and left the one before as it was."""
    others = {name: value for name, value in saved.counts.items() if before.counts.get(name, value) != value}
    return bool(others) and saved.state[0] is not before.state[0] and _counts(before.state[0]) == before.counts


def _num_holders(items: list[Any]) -> int:
    """Return the number of references to the only item of a list, with those that the count itself makes."""
    return sys.getrefcount(items[0])


def _optimizers(state: Any) -> Iterator[Optimizer]:
    if isinstance(state, Optimizer):
        yield state
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _optimizers(value)
