"""The record of one construction: the recipes of its deferred tensors, and the session that records them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from nucleate.deferred.active import Recording, active, turn
from nucleate.deferred.elements.conversion import Conversion, converted
from nucleate.deferred.elements.element_source import ElementSource, fill_from
from nucleate.deferred.elements.lazy_tensor import given_of_lazy, memory_of_lazy
from nucleate.deferred.elements.tensor_source import TensorSource
from nucleate.deferred.guards.guarded import guard
from nucleate.deferred.guards.handle import handle_of, release
from nucleate.deferred.guards.refusals import refuse_stale
from nucleate.deferred.impersonation.function_mode import Impersonation
from nucleate.deferred.impersonation.patches import patched
from nucleate.deferred.inference_mode import outside_inference_mode
from nucleate.deferred.module_tensors import held_tensors
from nucleate.deferred.onset import Onset
from nucleate.deferred.recording.recorder import Recorder
from nucleate.deferred.replay.live_writes import maker_of
from nucleate.deferred.replay.ranges import RangeMaker
from nucleate.deferred.replay.replayer import Replayer
from nucleate.deferred.tape.steps import Step
from nucleate.deferred.tape.tape import Tape, tape_of
from nucleate.devices import concrete, default_generator
from nucleate.errors import DeferredUseError
from nucleate.shells import named_modules

# For each tape the records that share it. Process-wide: a tensor that one record meets may belong to another.
_sharing: weakref.WeakKeyDictionary[Tape, weakref.WeakSet[Record]] = weakref.WeakKeyDictionary()


class Record(Recording):
    """The recipes of the deferred tensors of one construction.

    A record lives as long as one of its tensors is deferred. Records whose tensors meet share one tape from then on.

    Args:
        device: The device that the tensors stand for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = concrete(device)
        self.replayer = Replayer(Tape(), self.device)
        #: Records operations while it is entered.
        self.recorder = Recorder(self.replayer)
        itself = weakref.ref(self)

        def meet(tensor: Tensor) -> None:
            record = itself()
            if record is not None:
                record._meet(tensor)

        # Weakly, so that a record and its element sources are freed with its last tensor.
        self.recorder.on_stranger = meet
        #: Makes its tensors look like tensors of `device` to Python while something is recorded.
        self.impersonation = Impersonation(self.recorder)
        #: The answers to questions about its tensors after the constructor.
        self.answers: dict[Any, Any] = self.impersonation.answers
        #: The thread that constructs. The threads that it starts are recorded as well.
        self.thread: int | None = None
        # Tensors whose guards were removed while something is recorded, with their FQNs.
        self._taken: list[tuple[Tensor, str]] = []
        self._num_taken = 0
        # Parameters made while something is recorded. Not weakly: `swap_tensors` refuses tensors with weak references.
        self._parameters: list[Tensor] = []
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        # Addresses of storages whose tensors stay deferred although this record is that of a `deferred_from`.
        self._staying: set[int] = set()
        _sharing.setdefault(self.tape, weakref.WeakSet()).add(self)

    @property
    def tape(self) -> Tape:
        return self.replayer.tape

    @property
    def is_on(self) -> bool:
        return self.recorder.is_on

    @property
    def onset(self) -> Onset | None:
        return self.recorder.onset

    @contextmanager
    def recording(self, onset: Onset | None = None) -> Iterator[None]:
        """Record operations inside. On exit every generator has the state that eager construction would have left.

        Args:
            onset: The moment when the recording begins; by default at once.
        """
        with ExitStack() as stack:
            stack.callback(self._guard_all)
            stack.callback(self._settle)
            stack.enter_context(patched())
            stack.callback(self._end)
            self.thread = threading.get_ident()
            stack.enter_context(self.joined())
            if onset is not None:
                self.recorder.onset = onset
                self.recorder.threads.clear()
            yield

    @contextmanager
    def resumed(self, model: nn.Module) -> Iterator[None]:
        """Record operations on a model inside. On exit new deferred tensors of the model are guarded as well."""
        before = self._num_taken, len(self.tape.steps)
        try:
            with self.recording():
                yield
        finally:
            if (self._num_taken, len(self.tape.steps)) != before:
                self.guard(list(model.modules()))

    @contextmanager
    def joined(self, makes_real: bool = False) -> Iterator[None]:
        """Record this thread as well, until the recording ends or the thread leaves the context.

        The thread leaves inference mode meanwhile. Else the real tensors that a constructor makes beside the deferred
        ones could not be trained.
        """
        with ExitStack() as stack:
            stack.enter_context(outside_inference_mode())
            stack.enter_context(self.recorder)
            stack.enter_context(self.impersonation)
            stack.enter_context(active(self))
            stack.enter_context(self.factories(makes_real))
            stack.callback(self.recorder.threads.discard, threading.get_ident())
            self.recorder.threads.add(threading.get_ident())
            yield

    def followed(self) -> Callable[[], AbstractContextManager[object]] | None:
        # Where the recorder's mode is off, this thread replays, and the new thread helps it.
        if not any(mode is self.recorder for mode in _get_current_dispatch_mode_stack()):
            return None
        makes_real = self.recorder.makes_real

        def context() -> AbstractContextManager[object]:
            # A thread does not join a recording that has ended, and does not join twice.
            return self.joined(makes_real) if self.recorder.threads and not self.is_on else nullcontext()

        return context

    @contextmanager
    def reopened(self) -> Iterator[None]:
        self.refuse_other_thread()
        with turn, self.factories(real=True), self.recorder:
            is_nested = self.recorder.is_on
            self.recorder.threads.add(threading.get_ident())
            try:
                yield
            finally:
                if not is_nested:
                    self.recorder.threads.clear()
                    self.recorder.handed_out.clear()

    @contextmanager
    def factories(self, real: bool) -> Iterator[None]:
        before = self.recorder.makes_real
        self.recorder.makes_real = real
        try:
            yield
        finally:
            self.recorder.makes_real = before

    @contextmanager
    def loading(self) -> Iterator[None]:
        before = self.recorder.is_loading
        self.recorder.is_loading = True
        try:
            yield
        finally:
            self.recorder.is_loading = before

    def settle(self) -> None:
        with turn:
            self.replayer.settle()

    def notice(self, module: nn.Module) -> None:
        self._modules[id(module)] = weakref.ref(module)

    def notice_parameter(self, parameter: Tensor) -> None:
        self._parameters.append(parameter)

    def notice_state(self, state: Tensor) -> None:
        self.recorder.states.notice(state)

    def value(self, tensor: Tensor) -> Tensor:
        return self.recorder.value(tensor)

    def expose(self, tensor: Tensor) -> Tensor:
        return self.recorder.expose(tensor)

    def is_exposed(self, tensor: Tensor) -> bool:
        return self.recorder.exposed.holds(tensor)

    def impersonating(self) -> AbstractContextManager[object]:
        return self.impersonation

    def opaque(
        self, func: Callable[..., Tensor], tensor: Tensor, args: tuple[Any, ...], generator: torch.Generator | None
    ) -> Tensor:
        return self.recorder.opaque(func, tensor, args, generator)

    def given_by(self, target: Tensor, value: Any) -> TensorSource | None:
        return self.recorder.given_by(target, value)

    def holds(self, tensor: Tensor) -> bool:
        handle = handle_of(tensor)
        if handle is not None and handle.record.device == self.device:
            self.adopt_guarded(tensor)
        return self.tape.number(tensor) is not None

    def adopt_guarded(self, tensor: Tensor) -> None:
        handle = handle_of(tensor)
        if handle is None:
            return
        refuse_stale(tensor, handle)
        assert isinstance(handle.record, Record)
        self.join(handle.record)
        release(tensor)
        self._taken.append((tensor, handle.fqn))
        self._num_taken += 1

    def join(self, other: Record) -> None:
        """Share a tape with another record, because tensors of the two meet."""
        old = other.tape
        if old is self.tape:
            return
        other.refuse_other_thread()
        with turn:
            self._staying.update(old.addresses())
            self.recorder.absorb(other.recorder)
            for generator in other.replayer.random.generators(default_generator(self.device)):
                # So that a replay also restores the states of these generators.
                self.replayer.random.locate(generator)
            sharing = _sharing[self.tape]
            for record in list(_sharing.pop(old)):
                record.replayer.tape = self.tape
                sharing.add(record)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Keep the tensors that are made inside deferred, also when a `deferred_from` ends."""
        first = len(self.tape.addresses())
        try:
            yield
        finally:
            self._staying.update(self.tape.addresses()[first:])

    def survivors(self) -> tuple[list[nn.Module], list[Tensor]]:
        """Return the modules and the deferred tensors that live and would have values by now in eager construction.

        The tensors that stay deferred are left out.
        """
        # A parameter that only this list holds is freed here.
        parameters = [weakref.ref(parameter) for parameter in self._parameters]
        self._parameters.clear()
        self._parameters.extend(parameter for ref in parameters if (parameter := ref()) is not None)
        modules = _with_children([module for ref in self._modules.values() if (module := ref()) is not None])
        barren = set[int]()
        found = [tensor for module in modules for _, _, tensor in held_tensors(module, barren)]
        found.extend(self._parameters)
        found.extend(tensor for ref in self.recorder.handed_out if (tensor := ref()) is not None)
        with torch._C.DisableTorchFunction():
            tensors = {id(tensor): tensor for tensor in found if self.tape.number(tensor) is not None}
            return modules, [t for t in tensors.values() if t.untyped_storage()._cdata not in self._staying]

    def bind(self, tensor: Tensor, given: ElementSource) -> None:
        """Bind a deferred tensor to an element source. This replaces the value that the tensor had before.

        Args:
            tensor: A tensor of this record, of the shape of the element source.
            given: The element source. Its elements are cast to the tensor's dtype when the tensor is made.
        """
        self.bind_all([(tensor, given)])

    def bind_all(self, bindings: Iterable[tuple[Tensor, ElementSource]]) -> None:
        """Bind several deferred tensors; see `bind`."""
        with turn, torch._C.DisableTorchFunction(), _disable_current_modes():
            for tensor, given in bindings:
                if self.recorder.exposed.holds(tensor):
                    fill_from(self.recorder.exposed.view(tensor), given)
                else:
                    self.recorder.overwrite(tensor, given)
                if not tensor.is_inference():
                    # As after any write: the tensors that share its memory have changed as well.
                    torch._C._autograd._unsafe_set_version_counter((tensor,), (tensor._version + 1,))

    def of_lazy(self, value: Any) -> Tensor | None:
        """Return a deferred tensor for a tensor that its library has not read yet, or None for any other value.

        Args:
            value: Anything; see `given_of_lazy`. Call this while the record records and factories defer.
        """
        # The whole memory first: the tensor is a view of this memory, and may be transposed.
        given = memory_of_lazy(value) or given_of_lazy(value)
        if given is None:
            return None
        made = torch.empty(given.shape, dtype=given.dtype, device=self.device)
        if made.numel():
            self.bind(made, given)
        size, stride = value.rebuild_args[1:3]
        return made if made.shape == tuple(size) else made.as_strided(size, stride)

    def convert(self, tensor: Tensor, conversion: Conversion) -> tuple[Tensor, ...]:
        """Record a conversion of a deferred tensor as one step, and return its outputs, which are deferred.

        Args:
            tensor: A tensor of this record.
            conversion: The conversion.
        """
        with turn, torch._C.DisableTorchFunction(), _disable_current_modes(), outside_inference_mode():
            if self.recorder.exposed.holds(tensor):
                return tuple(map(self.recorder.adopt, converted(self.recorder.exposed.view(tensor), conversion)))
            ref = self.tape.ref(tensor)
            layout = conversion.layout(ref.size, ref.dtype)
            outs = tuple(torch.empty(out.shape, dtype=out.dtype, device="meta") for out in layout.outputs)
            creates = tuple(map(self.tape.add_storage, outs))
            step = self.tape.step(
                converted,
                (ref, conversion),
                outputs=tuple(map(self.tape.ref, outs)),
                reads=(ref.storage,),
                creates=creates,
            )
            self.tape.append(step)
            for out in outs:
                self.recorder.hand_out(out)
            return outs

    def converted(self, storage: int) -> Step | None:
        """Return the conversion that makes a storage of the tape, or None if another step has written to it."""
        writers = self.tape.writers(storage)
        step = self.tape.steps[writers[0]] if len(writers) == 1 else None
        return step if step is not None and step.func is converted else None

    def make(
        self, storage: int, device: torch.device, scratch: torch.UntypedStorage | None = None
    ) -> torch.UntypedStorage:
        """Make the content of one storage of the tape on a device; see `Replayer.storage`.

        If some tensors of the storage have been made before and still live, the others share their memory.
        """
        if scratch is not None:
            return self.replayer.storage(storage, device, scratch)
        made = self.tape.made(storage)
        if made is None or made.device.type != device.type or device.index not in (None, made.device.index):
            made = self.replayer.storage(storage, device)
            self.tape.keep_made(storage, made)
        return made

    def maker(self, storage: int, end: int | None = None) -> RangeMaker | None:
        """Return the range maker of one storage of the tape, or None; see `nucleate.deferred.replay.ranges`.

        Args:
            storage: The storage's number.
            end: The index of a step. The ranges have the content before this step; by default, the final content.
        """
        if end is None and self.tape.made(storage) is not None:
            return None
        return maker_of(self.tape, self.replayer.random, storage, end)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Make many calls of `make` inside cheaper. Autograd and torch's modes are off inside."""
        with turn, self.replayer.plain_torch():
            yield

    def _meet(self, tensor: Tensor) -> None:
        record = _record_by_storage(tensor)
        if record is not None and record.device == self.device:
            self.join(record)

    def refuse_other_thread(self) -> None:
        threads = {thread for record in list(_sharing.get(self.tape, ())) for thread in record.recorder.threads}
        if threads and threading.get_ident() not in threads:
            raise DeferredUseError(
                "this deferred tensor belongs to a model that another thread is constructing or editing. Wait until "
                "that thread has left its `init_module` block."
            )

    def _end(self) -> None:
        with turn:
            self.recorder.threads.clear()
            self.recorder.onset = None

    def _settle(self) -> None:
        try:
            self.settle()
        except BaseException:
            # An interrupt, most likely: this takes a while. No generator may be left with a token as its state.
            self.replayer.settle()
            raise

    def _guard_all(self) -> None:
        alive = [module for ref in self._modules.values() if (module := ref()) is not None]
        self._modules.clear()
        modules = _with_children(alive)
        barren = set[int]()
        held = [(module, name, tensor) for module in modules for _, name, tensor in held_tensors(module, barren)]
        self.recorder.states.settle_all(tensor for _, _, tensor in held)
        self._guard(modules, held)

    def guard(self, modules: list[nn.Module]) -> None:
        """Guard the deferred tensors that modules hold, and the deferred tensors that the caller kept."""
        barren = set[int]()
        held = [(module, name, tensor) for module in modules for _, name, tensor in held_tensors(module, barren)]
        self._guard(modules, held)

    def _guard(self, modules: list[nn.Module], held: list[tuple[nn.Module, str, Tensor]]) -> None:
        new = [each for each in held if handle_of(each[2]) is None and self.tape.number(each[2]) is not None]
        names = _names(modules) if new else {}
        for module, name, tensor in new:
            prefix = names.get(id(module), type(module).__name__)
            guard(tensor, self, f"{prefix}.{name}" if prefix else name)
        for tensor, fqn in self._taken:
            if handle_of(tensor) is None and self.tape.number(tensor) is not None:
                guard(tensor, self, fqn)
        # Tensors that no module holds: aliases that the caller kept. An edit through an alias would be lost as well.
        for stray in (*self._parameters, *(reference() for reference in self.recorder.handed_out)):
            if stray is not None and handle_of(stray) is None and self.tape.number(stray) is not None:
                guard(stray, self, f"a {type(stray).__name__} of shape {tuple(stray.shape)}")
        self._taken.clear()
        self._parameters.clear()
        # `swap_tensors` refuses tensors with weak references.
        self.recorder.handed_out.clear()


def record_of(tensor: Tensor) -> Record | None:
    """Return the record of a deferred tensor, also while it is being constructed, or None for any other tensor."""
    handle = handle_of(tensor)
    if handle is not None:
        assert isinstance(handle.record, Record)
        return handle.record
    return _record_by_storage(tensor)


def _record_by_storage(tensor: Tensor) -> Record | None:
    tape = tape_of(tensor)
    return None if tape is None else next(iter(_sharing.get(tape, ())), None)


def _with_children(modules: list[nn.Module]) -> list[nn.Module]:
    """Return modules and all their submodules, each once."""
    found: dict[int, nn.Module] = {}
    waiting = modules[::-1]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found.values())


def _names(modules: list[nn.Module]) -> dict[int, str]:
    """Name modules from the outermost one, as `named_modules` does."""
    children = {id(child) for module in modules for child in module._modules.values()}
    names: dict[int, str] = {}
    for root in modules:
        if id(root) not in children:
            names.setdefault(id(root), "")
            for name, module in named_modules(root):
                names.setdefault(id(module), name)
    return names
