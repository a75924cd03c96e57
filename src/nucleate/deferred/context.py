"""The context that turns a constructor into recipes, and the record it leaves behind."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.active import active, active_record, active_records, awaited_onsets, real_tensors, turn
from nucleate.deferred.conversion import Conversion, converted
from nucleate.deferred.given import Given, take
from nucleate.deferred.guard import guard
from nucleate.deferred.handle import handle_of, is_shared, refuse_stale, release
from nucleate.deferred.held import held_tensors
from nucleate.deferred.impersonate import Impersonation
from nucleate.deferred.lazy_given import given_of_lazy, memory_of_lazy
from nucleate.deferred.live_writes import pieces_of
from nucleate.deferred.onset import Onset
from nucleate.deferred.patches import patched
from nucleate.deferred.pieces import Pieces
from nucleate.deferred.record import Recorder
from nucleate.deferred.replay import Replayer
from nucleate.deferred.tape import Step, Tape
from nucleate.devices import concrete, default_generator
from nucleate.errors import DeferredUseError

# A tensor that one record meets may belong to another.
_records: weakref.WeakSet[Record] = weakref.WeakSet()


class Record:
    """How the deferred tensors of one construction are made.

    It lives as long as one of its tensors is deferred. Records whose tensors meet share one tape from then on.

    Args:
        device: The device that the tensors stand for.
    """

    def __init__(self, device: torch.device) -> None:
        device = concrete(device)
        self.device = device
        self.tape = Tape()
        self.replayer = Replayer(self.tape, device)
        #: Records operations while it is entered.
        self.recorder = Recorder(self.tape, self.replayer, device)
        itself = weakref.ref(self)

        def meet(tensor: Tensor) -> None:
            record = itself()
            if record is not None:
                record._meet(tensor)

        # Weakly, so that a record, and what its tensors were loaded from, goes with its last tensor.
        self.recorder.on_stranger = meet
        #: What Python sees of its tensors while something is recorded.
        self.impersonation = Impersonation(self.recorder)
        #: What questions about its tensors are answered after the constructor.
        self.answers: dict[Any, Any] = self.impersonation.answers
        #: The thread that constructs; those that it starts are recorded as well.
        self.thread: int | None = None
        # What the guards stepped aside from meanwhile.
        self._taken: list[tuple[Tensor, str]] = []
        #: Parameters made meanwhile. Not weakly: `swap_tensors` would refuse them.
        self.parameters: list[Tensor] = []
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        # Storages, by their addresses, of what stays deferred although this record is that of a `deferred_from`.
        self._staying: set[int] = set()
        _records.add(self)

    @contextmanager
    def recording(self, onset: Onset | None = None) -> Iterator[None]:
        """Record what is done inside; on exit every generator stands where eager construction would have left it.

        Args:
            onset: When to begin; by default at once.
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
    def joined(self, makes_real: bool = False) -> Iterator[None]:
        """Have this thread recorded as well, until the recording ends or it leaves the context."""
        with ExitStack() as stack:
            stack.enter_context(self.recorder)
            stack.enter_context(self.impersonation)
            stack.enter_context(active(self))
            stack.enter_context(self.factories(makes_real))
            stack.callback(self.recorder.threads.discard, threading.get_ident())
            self.recorder.threads.add(threading.get_ident())
            yield

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """Record one call on tensors that keep their guards otherwise; what it makes anew is real."""
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
        """Let factories make real tensors, or deferred ones again, while operations on deferred ones are recorded."""
        before = self.recorder.makes_real
        self.recorder.makes_real = real
        try:
            yield
        finally:
            self.recorder.makes_real = before

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Take by reference what is copied from real tensors into deferred ones."""
        before = self.recorder.is_loading
        self.recorder.is_loading = True
        try:
            yield
        finally:
            self.recorder.is_loading = before

    def settle(self) -> None:
        """Put every generator where eager construction would have left it."""
        with turn:
            self.replayer.settle()

    def notice(self, module: nn.Module) -> None:
        """Remember a module that was given something while this records."""
        self._modules[id(module)] = weakref.ref(module)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is one of this recording; a guarded one of its device becomes one."""
        handle = handle_of(tensor)
        if handle is not None and handle.record.device == self.device:
            self.take(tensor)
        return self.tape.number(tensor) is not None

    def take(self, tensor: Tensor) -> None:
        """Take the guard off a tensor until this recording ends: what is done to it becomes part of its recipe."""
        handle = handle_of(tensor)
        if handle is None:
            return
        refuse_stale(tensor, handle)
        self.join(handle.record)
        release(tensor)
        self._taken.append((tensor, handle.fqn))

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
                # So that replaying gives these back as well as its own.
                self.replayer.random.locate(generator)
            for record in list(_records):
                if record.tape is old:
                    record.tape = record.replayer.tape = record.recorder.tape = self.tape

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Let what is made inside stay deferred, also when a `deferred_from` ends."""
        first = len(self.tape.addresses())
        try:
            yield
        finally:
            self._staying.update(self.tape.addresses()[first:])

    def survivors(self) -> tuple[list[nn.Module], list[Tensor]]:
        """Return what would have values by now in eager construction: modules, and the deferred tensors that live.

        Without those that stay deferred.
        """
        # Those that only this list knows are gone.
        parameters = [weakref.ref(parameter) for parameter in self.parameters]
        self.parameters.clear()
        self.parameters.extend(parameter for ref in parameters if (parameter := ref()) is not None)
        modules = _with_children([module for ref in self._modules.values() if (module := ref()) is not None])
        barren = set[int]()
        found = [tensor for module in modules for _, _, tensor in held_tensors(module, barren)]
        found.extend(self.parameters)
        found.extend(tensor for ref in self.recorder.handed_out if (tensor := ref()) is not None)
        with torch._C.DisableTorchFunction():
            tensors = {id(tensor): tensor for tensor in found if self.tape.number(tensor) is not None}
            return modules, [t for t in tensors.values() if t.untyped_storage()._cdata not in self._staying]

    def give(self, tensor: Tensor, given: Given) -> None:
        """Record that a deferred tensor's content is what is given, whatever it was before.

        Args:
            tensor: A tensor of this record, of the shape of what is given.
            given: The elements; they are cast to the tensor's dtype when it is made.
        """
        with turn, torch._C.DisableTorchFunction(), _disable_current_modes():
            if self.recorder.exposed.holds(tensor):
                take(self.recorder.exposed.view(tensor), given)
            else:
                self.recorder.overwrite(tensor, given)
            if not tensor.is_inference():
                # As for any write: the tensors that share its memory have changed as well.
                torch._C._autograd._unsafe_set_version_counter((tensor,), (tensor._version + 1,))

    def of_lazy(self, value: Any) -> Tensor | None:
        """Return a deferred tensor for one that its library has not read yet, or None for any other value.

        Args:
            value: Anything; see `given_of_lazy`. Call this while the record records and factories defer.
        """
        # The whole memory first: the tensor is a view on it, and may be a transposed one.
        given = memory_of_lazy(value) or given_of_lazy(value)
        if given is None:
            return None
        made = torch.empty(given.shape, dtype=given.dtype, device=self.device)
        if made.numel():
            self.give(made, given)
        size, stride = value.rebuild_args[1:3]
        return made if made.shape == tuple(size) else made.as_strided(size, stride)

    def convert(self, tensor: Tensor, conversion: Conversion) -> tuple[Tensor, ...]:
        """Record a conversion of a deferred tensor as one step, and return what it makes, deferred.

        Args:
            tensor: A tensor of this record.
            conversion: What to make of it.
        """
        with turn, torch._C.DisableTorchFunction(), _disable_current_modes():
            if self.recorder.exposed.holds(tensor):
                return tuple(map(self.recorder.adopt, converted(self.recorder.exposed.view(tensor), conversion)))
            ref = self.tape.ref(tensor)
            layout = conversion.layout(ref.size, ref.dtype)
            outs = tuple(torch.empty(out.shape, dtype=out.dtype, device="meta") for out in layout.outputs)
            step = Step(
                index=len(self.tape.steps),
                func=converted,
                args=(ref, conversion),
                kwargs={},
                outputs=(),
                reads=(ref.storage,),
                written=(),
                creates=tuple(map(self.tape.add_storage, outs)),
                overwrites=(),
                default_dtype=torch.get_default_dtype(),
            )
            step.outputs = tuple(map(self.tape.ref, outs))
            self.tape.add_step(step)
            for out in outs:
                self.recorder.hand_out(out)
            return outs

    def converted(self, storage: int) -> Step | None:
        """Return the conversion that makes a storage of the tape, if nothing has written to it since."""
        writers = self.tape.writers(storage)
        step = self.tape.steps[writers[0]] if len(writers) == 1 else None
        return step if step is not None and step.func is converted else None

    def make(
        self, storage: int, device: torch.device, scratch: torch.UntypedStorage | None = None
    ) -> torch.UntypedStorage:
        """Make the content of one storage of the tape on a device; see `Replayer.storage`.

        Where some of its tensors have been made before, and are still there, the others share their memory.
        """
        if scratch is not None:
            return self.replayer.storage(storage, device, scratch)
        made = self.tape.made(storage)
        if made is None or made.device.type != device.type or device.index not in (None, made.device.index):
            made = self.replayer.storage(storage, device)
            self.tape.keep_made(storage, made)
        return made

    def pieces(self, storage: int, end: int | None = None) -> Pieces | None:
        """Return how ranges of one storage of the tape are made, or None; see `nucleate.deferred.pieces`.

        Args:
            storage: The storage's number.
            end: As it was before the step with this index; by default, as it is at the end.
        """
        if end is None and self.tape.made(storage) is not None:
            return None
        return pieces_of(self.tape, self.replayer.random, storage, end)

    @contextmanager
    def making(self) -> Iterator[None]:
        """Return a context that makes many calls of `make` cheaper; autograd and torch's modes are off in it."""
        with turn, self.replayer.plain_torch():
            yield

    def _meet(self, tensor: Tensor) -> None:
        for record in list(_records):
            if record.device == self.device and record.tape.number(tensor) is not None:
                self.join(record)
                return

    def refuse_other_thread(self) -> None:
        """Raise if another thread is recording what this thread wants to change."""
        threads = {
            thread for record in list(_records) if record.tape is self.tape for thread in record.recorder.threads
        }
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
            # An interrupt, most likely: this takes a while. No generator may be left with a state that is none.
            self.replayer.settle()
            raise

    def _guard_all(self) -> None:
        alive = [module for ref in self._modules.values() if (module := ref()) is not None]
        self._modules.clear()
        modules = _with_children(alive)
        barren = set[int]()
        held = (tensor for module in modules for _, _, tensor in held_tensors(module, barren))
        self.recorder.states.settle_all(held)
        self.guard(modules)

    def guard(self, modules: list[nn.Module]) -> None:
        """Guard the deferred tensors that modules hold, and those that the caller kept."""
        names = _names(modules)
        barren = set[int]()
        for module in modules:
            for _, name, tensor in held_tensors(module, barren):
                if handle_of(tensor) is None and self.tape.number(tensor) is not None:
                    prefix = names.get(id(module), type(module).__name__)
                    guard(tensor, self, f"{prefix}.{name}" if prefix else name)
        for tensor, fqn in self._taken:
            if handle_of(tensor) is None and self.tape.number(tensor) is not None:
                guard(tensor, self, fqn)
        # What no module holds: aliases that the caller kept, through which an edit would be lost as well.
        for stray in (*self.parameters, *(reference() for reference in self.recorder.handed_out)):
            if stray is not None and handle_of(stray) is None and self.tape.number(stray) is not None:
                guard(stray, self, f"a {type(stray).__name__} of shape {tuple(stray.shape)}")
        self._taken.clear()
        self.parameters.clear()
        # `swap_tensors` refuses tensors that are held weakly.
        self.recorder.handed_out.clear()


@contextmanager
def deferred(device: torch.device | str = "cpu") -> Iterator[Record]:
    """Construct models without making their tensors: each becomes a recipe, made later by `materialize`.

    Args:
        device: The device that the tensors will live on; construction behaves as it would there. For a device other
            than the CPU the reference is construction under `torch.device(device)`, which the caller enters. A device
            that this machine does not have can be recorded for, but nothing can be made.

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
    device = concrete(device)
    outer = active_record(device)
    if outer is not None and outer.thread == threading.get_ident():
        # Inside another recording for the same device there is nothing to begin and nothing to end.
        with outer.factories(real=False), outer.staying():
            yield outer
        return
    record = Record(device)
    with record.recording():
        yield record


@contextmanager
def deferred_from(numel: int, device: torch.device) -> Iterator[Record]:
    """Construct models, and record from the first tensor on that has so many elements; what precedes is real.

    Args:
        numel: How many elements such a tensor has.
        device: See `deferred`.

    Yields:
        The record. Its `survivors`, asked for as the last thing inside, are to be made when the context has ended.
    """
    record = Record(device)
    with record.recording(Onset(numel)):
        yield record


def record_of(tensor: Tensor) -> Record | None:
    """Return the record of a deferred tensor, also while it is being constructed, or None for any other tensor."""
    handle = handle_of(tensor)
    if handle is not None:
        return handle.record
    return next((record for record in list(_records) if record.tape.number(tensor) is not None), None)


def give(tensor: Tensor, given: Given) -> None:
    """Let a deferred tensor's content come from elsewhere, such as a file, instead of from its recipe.

    Nothing is read before the tensor is made, and then only the part that is wanted.

    Args:
        tensor: A deferred tensor of the shape of what is given.
        given: The elements.

    Raises:
        DeferredEditError: The tensor was edited where nothing recorded it.
    """
    record = record_of(tensor)
    assert record is not None, "not a deferred tensor"
    handle = handle_of(tensor)
    if handle is not None:
        refuse_stale(tensor, handle)
    record.give(tensor, given)


def convert(tensor: Tensor, conversion: Conversion) -> tuple[Tensor, ...]:
    """Make several tensors of one: codes and scales of a weight, for example.

    Of a deferred tensor this records one step, and what it returns is deferred as well. When that is made, ranges of
    the tensor are made, converted and forgotten, so that it is never whole in memory. A real tensor is converted now.

    Args:
        tensor: The tensor, deferred or real. It is not changed.
        conversion: What to make of it.

    Returns:
        The outputs that the conversion's layout lists.

    Raises:
        ConversionError: The tensor cannot be converted. What only its values can tell is found when they are made.
        DeferredEditError: The tensor was edited where nothing recorded it.
    """
    record = record_of(tensor)
    if record is None:
        return converted(tensor, conversion)
    handle = handle_of(tensor)
    if handle is not None:
        refuse_stale(tensor, handle)
    return record.convert(tensor, conversion)


@contextmanager
def eager() -> Iterator[None]:
    """Make real tensors inside a `deferred` context, at once; what is done to deferred ones is still recorded.

    The random stream goes on where the recording stands, so that values and stream are those of eager construction.
    Outside a `deferred` context it does nothing.
    """
    with ExitStack() as stack:
        for record in active_records():
            record.replayer.settle()
            stack.enter_context(record.factories(real=True))
        for onset in awaited_onsets():
            stack.enter_context(onset.suspended())
        stack.enter_context(real_tensors())
        yield


@contextmanager
def resumed(model: nn.Module) -> Iterator[None]:
    """Record again what is done to the deferred tensors of a model; a model without any is left alone.

    Args:
        model: The model.
    """
    barren = set[int]()
    held = [tensor for module in model.modules() for _, _, tensor in held_tensors(module, barren)]
    handles = [(tensor, handle) for tensor in held if (handle := handle_of(tensor)) is not None]
    with ExitStack() as stack:
        for device in dict.fromkeys(handle.record.device for _, handle in handles):
            record = active_record(device)
            if record is None:
                record = next(handle.record for _, handle in handles if handle.record.device == device)
                stack.callback(_guard_model, record, model)
                stack.enter_context(record.recording())
            for tensor, handle in handles:
                if handle.record.device == device and not is_shared(tensor, handle):
                    record.take(tensor)
        yield


def _guard_model(record: Record, model: nn.Module) -> None:
    record.guard(list(model.modules()))


def _with_children(modules: list[nn.Module]) -> list[nn.Module]:
    """Return modules and all that they contain, each once."""
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
            for name, module in root.named_modules():
                names.setdefault(id(module), name)
    return names
