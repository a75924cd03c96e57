"""The context that turns a constructor into recipes, and the record it leaves behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from nucleate.deferred.guard import guard, handle_of, held_tensors, release
from nucleate.deferred.impersonate import Impersonation
from nucleate.deferred.pieces import Pieces, pieces_of
from nucleate.deferred.record import Recorder
from nucleate.deferred.replay import Replayer
from nucleate.deferred.tape import Tape

# The record of this thread's innermost recording.
_recording = threading.local()


class Record:
    """How the deferred tensors of one construction are made.

    It lives as long as one of its tensors is deferred.

    Args:
        device: The device that the tensors stand for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tape = Tape()
        self.replayer = Replayer(self.tape, device)
        self._recorder = Recorder(self.tape, self.replayer, device)
        #: What questions about its tensors are answered after the constructor.
        self.answers: dict[Any, Any] = Impersonation(self._recorder).answers

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is done inside; on exit every generator stands where eager construction would have left it."""
        constructed: list[nn.Module] = []
        with ExitStack() as stack:
            stack.callback(self._guard, constructed)
            stack.enter_context(_watched_modules(constructed))
            stack.callback(self.replayer.settle)
            stack.enter_context(self._opaque_initializers())
            stack.enter_context(self._recorder)
            stack.enter_context(Impersonation(self._recorder))
            stack.callback(setattr, _recording, "record", getattr(_recording, "record", None))
            _recording.record = self
            yield

    @contextmanager
    def resumed(self, model: nn.Module) -> Iterator[None]:
        """Record again, so that what is done to the deferred tensors of `model` becomes part of their recipes."""
        for module in model.modules():
            for _, _, tensor in held_tensors(module):
                handle = handle_of(tensor)
                if handle is not None and handle.record is self:
                    release(tensor)
        try:
            with self.recording():
                yield
        finally:
            self._guard(list(model.modules()))

    def make(
        self, storage: int, device: torch.device, scratch: torch.UntypedStorage | None = None
    ) -> torch.UntypedStorage:
        """Make the content of one storage of the tape on a device; see `Replayer.storage`."""
        return self.replayer.storage(storage, device, scratch)

    def pieces(self, storage: int) -> Pieces | None:
        """Return how ranges of one storage of the tape are made, or None; see `nucleate.deferred.pieces`."""
        return pieces_of(self.tape, self.replayer.random, storage)

    def making(self) -> AbstractContextManager[None]:
        """Return a context that makes many calls of `make` cheaper; autograd and torch's modes are off in it."""
        return self.replayer.plain_torch()

    def _guard(self, modules: list[nn.Module]) -> None:
        names = _names(modules)
        for module in modules:
            for _, name, tensor in held_tensors(module):
                if handle_of(tensor) is None and self.tape.number(tensor) is not None:
                    prefix = names.get(id(module), type(module).__name__)
                    guard(tensor, self, f"{prefix}.{name}" if prefix else name)
        # What no module holds: aliases that the caller kept, through which an edit would be lost as well.
        for reference in self._recorder.handed_out:
            stray = reference()
            if stray is not None and handle_of(stray) is None and self.tape.number(stray) is not None:
                guard(stray, self, f"a {type(stray).__name__} of shape {tuple(stray.shape)}")
        # `swap_tensors` refuses tensors that are held weakly.
        self._recorder.handed_out.clear()

    @contextmanager
    def _opaque_initializers(self) -> Iterator[None]:
        # A rejection loop: how much randomness it uses is known only by running it. The public function looks
        # this name up in its module at each call, so this also reaches those who imported `trunc_normal_`.
        original = torch.nn.init._no_grad_trunc_normal_

        def trunc_normal(
            tensor: Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
        ) -> Tensor:
            if self.tape.number(tensor) is None:
                return original(tensor, mean, std, a, b, generator)
            return self._recorder.opaque(original, tensor, (mean, std, a, b), generator)

        torch.nn.init._no_grad_trunc_normal_ = trunc_normal
        try:
            yield
        finally:
            torch.nn.init._no_grad_trunc_normal_ = original


@contextmanager
def deferred(device: torch.device | str = "cpu") -> Iterator[Record]:
    """Construct models without making their tensors: each becomes a recipe, made later by `materialize`.

    Args:
        device: The device that the tensors will live on; construction behaves as it would there. For CUDA the
            reference is construction under `torch.device("cuda")`, which the caller enters.

    Yields:
        The record. On exit, also by an exception, every random generator stands where eager construction would
        have left it.

    Example:
        >>> import torch
        >>> from nucleate.deferred import deferred
        >>> from nucleate.materialize import materialize
        >>> with deferred():
        ...     model = torch.nn.Linear(2, 2)
        >>> print(repr(model.weight).splitlines()[-1])
        Parameter(deferred, shape=(2, 2), dtype=torch.float32)
        >>> _ = materialize(model)
    """
    active = getattr(_recording, "record", None)
    if active is not None and active.device == torch.device(device):
        # Inside another recording for the same device there is nothing to begin and nothing to end.
        yield active
        return
    record = Record(torch.device(device))
    with record.recording():
        yield record


@contextmanager
def _watched_modules(constructed: list[nn.Module]) -> Iterator[None]:
    """Collect the modules that register something meanwhile and are alive at the end."""
    seen: dict[int, weakref.ref[nn.Module]] = {}

    def notice(module: nn.Module, name: str, value: Any) -> None:
        seen[id(module)] = weakref.ref(module)

    def notice_both(module: nn.Module, name: str, value: Any) -> None:
        notice(module, name, value)
        if isinstance(value, nn.Module):
            notice(value, name, None)

    def set_state(module: nn.Module, state: dict[str, Any]) -> None:
        notice(module, "", None)
        original_set_state(module, state)  # type: ignore[no-untyped-call]

    # `deepcopy` and `torch.load` make modules that register nothing.
    original_set_state = nn.Module.__setstate__
    nn.Module.__setstate__ = set_state  # type: ignore[method-assign]
    hooks = [
        nn_module.register_module_parameter_registration_hook(notice),
        nn_module.register_module_buffer_registration_hook(notice),
        nn_module.register_module_module_registration_hook(notice_both),
    ]
    try:
        yield
    finally:
        nn.Module.__setstate__ = original_set_state  # type: ignore[method-assign]
        for hook in hooks:
            hook.remove()
        alive = (module for ref in list(seen.values()) if (module := ref()) is not None)
        constructed.extend({id(m): m for module in alive for m in module.modules()}.values())


def is_recording() -> bool:
    """Return whether this thread is inside a `deferred` context."""
    return getattr(_recording, "record", None) is not None


def _names(modules: list[nn.Module]) -> dict[int, str]:
    """Name modules from the outermost one, as `named_modules` does."""
    children = {id(child) for module in modules for child in module._modules.values()}
    names: dict[int, str] = {}
    for root in modules:
        if id(root) not in children:
            for name, module in root.named_modules():
                names.setdefault(id(module), name)
    return names
