"""The recorder: a dispatch mode under which constructors write to the tape instead of to memory.

The recorder records an aten operation on meta tensors, or runs it for real. Three kinds run for real: operations on
real tensors only, questions that Python asks about a value (`item`, `equal`), and writes of deferred values into real
tensors. If an operation has no meta kernel, or the shape of its result depends on values, the recorder runs it once to
find its geometry, and records it all the same. `impersonation/` decides how Python sees a deferred tensor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nucleate.deferred.active import alone, turn
from nucleate.deferred.elements.element_source import ElementSource, fill_from
from nucleate.deferred.elements.tensor_source import TensorSource
from nucleate.deferred.inference_mode import ordinary, outside_inference_mode
from nucleate.deferred.onset import Onset
from nucleate.deferred.recording.constants import Constants
from nucleate.deferred.recording.fast_path import FastPath, generator_for
from nucleate.deferred.recording.generator_states import GeneratorStates
from nucleate.deferred.recording.known_values import KnownValues
from nucleate.deferred.recording.meta_shapes import (
    is_doubtful,
    is_plain,
    result_on_meta,
    result_on_stand_ins,
    to_meta,
    trust,
)
from nucleate.deferred.recording.op_schema import (
    OpSchema,
    check_bounds,
    needed_by,
    overwritten_by,
    read_by,
    refuse_overlap,
    schema_of,
    written_by,
)
from nucleate.deferred.recording.real_memory import RealMemory
from nucleate.deferred.replay.replayer import Replayer, view
from nucleate.deferred.tape.leaves import map_leaves, tensors
from nucleate.deferred.tape.steps import Constant, Position, Step, TensorRef
from nucleate.deferred.tape.tape import Tape
from nucleate.devices import concrete, default_generator, is_present
from nucleate.devices.generators import Generator

aten = torch.ops.aten


class _Flags(threading.local):
    meta_is_meant = False
    makes_real = False
    is_loading = False


class Recorder(TorchDispatchMode):
    """The dispatch mode that records a constructor's operations on tensors of one device.

    Args:
        replayer: The replayer, which answers questions about values. It holds the tape, the random program and the
            device that deferred tensors stand for.
    """

    def __init__(self, replayer: Replayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.replayer = replayer
        self.device = device = replayer.device
        #: Whether values can be made on the device. If not, this machine does not have it, and only records for it.
        self.is_present = is_present(device)
        #: The Python objects of deferred tensors, as long as they live. Those alive at the end are guarded.
        self.handed_out: list[weakref.ref[Tensor]] = []
        #: The threads that it records. In other threads that have entered it, it does nothing.
        self.threads: set[int] = set()
        #: The onset at which it begins to record, if it has not begun yet.
        self.onset: Onset | None = None
        self._flags = _Flags()
        #: Called with each meta tensor that is not on this tape. The tensor's recording may then join this one.
        self.on_stranger: Callable[[Tensor], None] = lambda tensor: None
        #: Deferred tensors whose memory is real, because somebody outside torch may write it.
        self.exposed = RealMemory(replayer)
        #: The generator states that were handed out during the recording.
        self.states = GeneratorStates(replayer)
        self._values = KnownValues(replayer)
        self._constants = Constants()
        self._fast_path = FastPath(replayer, self.exposed, self.handed_out)

    @property
    def tape(self) -> Tape:
        """The tape that gets the steps."""
        return self.replayer.tape

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        with turn:
            self._values.forget()

    @property
    def is_on(self) -> bool:
        """Whether it records this thread."""
        return threading.get_ident() in self.threads

    @property
    def meta_is_meant(self) -> bool:
        """Whether Python runs a call that names the meta device itself, so that meta stands for no other device."""
        return self._flags.meta_is_meant

    @meta_is_meant.setter
    def meta_is_meant(self, value: bool) -> None:
        self._flags.meta_is_meant = value

    @property
    def makes_real(self) -> bool:
        """Whether factories make real tensors, so that only operations on deferred tensors are recorded."""
        return self._flags.makes_real

    @makes_real.setter
    def makes_real(self, value: bool) -> None:
        self._flags.makes_real = value

    @property
    def is_loading(self) -> bool:
        """Whether a state dict is being loaded, so that deferred tensors take real ones by reference."""
        return self._flags.is_loading

    @is_loading.setter
    def is_loading(self, value: bool) -> None:
        self._flags.is_loading = value

    def absorb(self, other: Recorder) -> None:
        """Take over the tape of another recorder for the same device, and the real tensors that its steps read."""
        self.tape.absorb(other.tape)
        self.exposed.absorb(other.exposed)
        self._constants.absorb(other._constants)
        self.handed_out.extend(other.handed_out)

    def hand_out(self, tensor: Tensor) -> None:
        """Remember a deferred tensor that Python is going to hold."""
        self.handed_out.append(weakref.ref(tensor))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the first dispatched operation imports torch._dynamo, which takes longer than most constructors.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.is_on:
            if self.onset is None or not self.onset.is_now(self.is_for, func, args, kwargs):
                return func(*args, **kwargs)
            self.begin()
        if torch.is_inference_mode_enabled():
            return self._dispatch_inferred(func, args, kwargs)
        with turn, torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs)

    def begin(self) -> None:
        """Record this thread from here on."""
        self.onset = None
        self.threads.add(threading.get_ident())

    # -- routing -------------------------------------------------------------------------------------------

    def _dispatch_inferred(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Route an operation that was called in inference mode. Its result is what it is outside of that mode.

        Autograd splits composite operations, such as `to` and `reshape`, which copy where they cannot view. Inference
        mode passes autograd by, so composite operations arrive whole. The tensors that an operation makes in inference
        mode would be inference tensors.
        """
        if schema_of(func).is_composite:
            with torch._C.DisableTorchFunction(), self._entered_again():
                # Not `decompose`, which prefers decompositions that are written in Python for compilers.
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        if func is aten.lift_fresh.default:
            return ordinary(args[0])  # A tensor of Python data, which no mode has seen before.
        # Leaving the mode lets autograd in, but a dispatch mode always runs below autograd.
        below_autograd = torch._C._AutoDispatchBelowADInplaceOrView()
        with outside_inference_mode(), below_autograd, turn, torch._C.DisableTorchFunction():
            return self._dispatch(func, args, kwargs)

    @contextmanager
    def _entered_again(self) -> Iterator[None]:
        """Enter this mode inside of its own handler."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        schema = schema_of(func)
        if schema.fills and self._fast_path.record_fill(func, schema, args, kwargs):
            return args[0]
        given = tensors((args, kwargs))
        if not given:
            return self._dispatch_factory(func, schema, args, kwargs)
        for tensor in given:
            if tensor.is_meta and self.tape.number(tensor) is None:
                self.on_stranger(tensor)
            elif not tensor.is_meta:
                self.states.settle(tensor)
        if all(self.tape.number(tensor) is None for tensor in given):
            return self._dispatch_real(func, schema, args, kwargs, any(tensor.is_meta for tensor in given))
        return self._dispatch_deferred(func, schema, args, kwargs)

    def _dispatch_factory(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Route an operation without tensors. Its result is deferred if it is for the recorder's device."""
        # A tensor without elements has nothing to defer. Also, `torch.load`, `deepcopy` and storages make such tensors
        # and then set them to real memory, so they must be real.
        holds_nothing = schema.uninitialized and bool(args) and 0 in args[0]
        if self._is_ours(schema, kwargs):
            if not holds_nothing or not self.is_present:
                made = self._fast_path.record_factory(func, schema, args, kwargs)
                return self._record(func, schema, args, kwargs) if made is None else made
            if "device" in kwargs:
                kwargs = {**kwargs, "device": self.device}
        return self._run_random(func, schema, args, kwargs) if schema.is_random else func(*args, **kwargs)

    def _dispatch_real(
        self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any], any_meta: bool
    ) -> Any:
        """Route an operation on tensors that are not deferred. It runs now, with the true generator state if random."""
        if schema.is_random:
            if schema.mutated or self.makes_real:
                return self._run_random(func, schema, args, kwargs)
            if not any_meta:
                # Numbers that are drawn for a tensor of another device come from that device, and are real.
                record = self._is_own(_device_of(args, kwargs))
                return (self._record if record else self._run_random)(func, schema, args, kwargs)
            device = kwargs.get("device")
            stays = device is None or device.type == "meta"
            return func(*args, **kwargs) if stays else self._run_random(func, schema, args, kwargs)
        device = kwargs.get("device") if schema.device else None
        if device is not None and device.type == "meta" and not self.meta_is_meant:
            # C++ code that reads the options of a deferred tensor sees meta, but means the device that meta stands for.
            return self._record(func, schema, args, kwargs)
        return self._run_plain(func, schema, args, kwargs)

    def _dispatch_deferred(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Route an operation on deferred tensors. It is recorded, unless its result has to be real."""
        if schema.retargets:
            return self._retarget(func, args, kwargs)
        written = written_by(schema, args, kwargs)
        if any(self.tape.number(tensor) is None or self.exposed.holds(tensor) for tensor in written):
            # The operation writes to real memory, so the deferred values that it uses are made now.
            return self._write_real(func, schema, args, kwargs)
        if func is aten.copy_.default and (given := self.given_by(*args[:2])) is not None:
            self.overwrite(args[0], given)
            return args[0]
        if not written and (func.is_view or func is aten.detach.default):
            if func is aten.as_strided.default:
                # The meta kernel does not check whether the view lies within its memory.
                memory = torch.UntypedStorage(args[0].untyped_storage().nbytes())
                func(view(memory, self.tape.ref(args[0])), *args[1:], **kwargs)
            result = func(*args, **kwargs)
            self.handed_out.extend(map(weakref.ref, tensors(result)))
            return result
        if schema.device and (target := kwargs.get("device")) is not None and not self._is_own(target):
            if target.type == "meta" and self.meta_is_meant:
                return func(*args, **kwargs)
            if target.type != "meta":
                return func(*map_leaves(args, self._resolve), **map_leaves(kwargs, self._resolve))
        return self._record(func, schema, args, kwargs)

    def given_by(self, target: Tensor, value: Any) -> TensorSource | None:
        """Return an element source that refers to a real tensor, or None if its values are to be recorded otherwise."""
        if not isinstance(value, Tensor) or value.is_meta:
            return None
        if self.is_loading and (value.is_quantized or value.layout != torch.strided):
            # torch refuses to copy most of these, and this copy raises its error early enough.
            real = torch.empty(target.shape, dtype=target.dtype, device=value.device).copy_(value)
            return self._constants.given(real)
        if not is_plain(value) or value.layout != torch.strided:
            return None
        same = value.dtype == target.dtype
        casts = same or (value.dtype.is_floating_point and target.dtype.is_floating_point)
        if not casts or target.is_conj() or target.is_neg() or not target.numel():
            return None
        if not self.is_loading and (not same or value.untyped_storage().resizable()):
            return None
        if value.shape != target.shape:
            try:
                value = value.expand(target.shape)
            except RuntimeError:
                return None  # Recording it like any other operation raises the error.
        given = self._constants.given(value)
        return given if self.is_loading or given.is_mapped else None

    def overwrite(self, tensor: Tensor, given: ElementSource) -> None:
        """Record that an element source overwrites a deferred tensor.

        Args:
            tensor: A tensor of this tape without real memory, with the shape of the element source.
            given: The element source. Its elements are cast to the tensor's dtype when the tensor is materialized.
        """
        ref = self.tape.ref(tensor)
        if ref.fills(self.tape.size_bytes(ref.storage)):
            self.tape.forget_given(ref.storage)
        self.tape.overwrite(ref, fill_from, (ref, given))

    def _is_own(self, device: torch.device) -> bool:
        if device.type != self.device.type:
            return False
        if device.type == "cpu":
            return True  # Every index means the one CPU.
        if device.index is None and self.is_present:
            device = concrete(device)  # The current device, which the constructor may have changed.
        return device.index in (None, self.device.index)

    def _is_ours(self, schema: OpSchema, kwargs: dict[str, Any]) -> bool:
        """Return whether a factory makes a deferred tensor."""
        if not schema.device:
            return False
        device = kwargs.get("device")
        if device is not None and device.type == "meta":
            return not self.meta_is_meant
        return not self.makes_real and self.is_for(device)

    def is_for(self, device: torch.device | None) -> bool:
        """Return whether a factory with this `device` argument makes a tensor for the recorder's device."""
        return self.device.type == "cpu" if device is None else self._is_own(device)

    def _write_real(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that writes real memory. Deferred tensors that it also writes get real memory too."""
        originals: dict[int, tuple[Tensor, Tensor]] = {}
        written = set(map(id, written_by(schema, args, kwargs)))

        def real(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or self.tape.number(leaf) is None:
                return leaf
            value = self.expose(leaf) if id(leaf) in written else self.value(leaf)
            originals[id(value)] = value, leaf
            return value

        real_args, real_kwargs = map_leaves(args, real), map_leaves(kwargs, real)
        run = self._run_random if schema.is_random else self._run_plain
        result = run(func, schema, real_args, real_kwargs)
        return map_leaves(result, lambda leaf: originals[id(leaf)][1] if id(leaf) in originals else leaf)

    def _retarget(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Point a tensor to other memory, or change the size of its memory."""
        target = args[0]
        if self.tape.number(target) is None:
            return func(
                *map_leaves(args, lambda leaf: self.expose(leaf) if self._is_deferred(leaf) else leaf), **kwargs
            )
        for source in args[1:2]:
            if isinstance(source, Tensor) and not source.is_meta and source.device.type != self.device.type:
                # torch refuses this, with its own error.
                func(torch.empty(0, dtype=source.dtype, device=self.device), source)
        result = func(target, *map_leaves(args[1:], self._adopted), **kwargs)
        if self.tape.number(target) is None:
            # `set_()` without a source gives the tensor new memory of zero bytes.
            self._record(aten.empty.memory_format, schema_of(aten.empty.memory_format), ([0],), {})
            target.set_(self.tape.storage(-1), 0, (0,), (1,))
        self.exposed.resize(target)
        return result

    # -- recording -----------------------------------------------------------------------------------------

    def record(self, func: Callable[..., Any], schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a Python function as one step. At least one of its tensors is deferred."""
        with turn, torch._C.DisableTorchFunction(), outside_inference_mode():
            written = written_by(schema, args, kwargs)
            if any(self.tape.number(tensor) is None or self.exposed.holds(tensor) for tensor in written):
                with _disable_current_modes():
                    return self._write_real(func, schema, args, kwargs)
            with _disable_current_modes():
                return self._record(func, schema, args, kwargs)

    def _record(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if schema.indexes and self.is_present:
            check_bounds(func, args, lambda leaf: self.value(leaf) if leaf.is_meta else leaf)
        written = written_by(schema, args, kwargs)
        if schema.is_random:
            refuse_overlap(written)
        written_refs = tuple(self.tape.ref(tensor) for tensor in written)
        replay_args, replay_kwargs = map_leaves(args, self._capture), map_leaves(kwargs, self._capture)
        if schema.device:
            device = replay_kwargs.get("device")
            if device is not None or not tensors((args, kwargs)):
                replay_kwargs["device"] = self.device
            if "pin_memory" in kwargs:
                replay_kwargs.pop("pin_memory")
                kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        position, generator = self._locate(schema, args, kwargs)
        reads = self._reads(schema, args, kwargs, written_refs)
        step = self.tape.step(
            func,
            replay_args,
            replay_kwargs,
            reads=reads,
            written=written_refs,
            overwrites=overwritten_by(self.tape, schema, written_refs, reads),
            position=position,
            uninitialized=schema.uninitialized,
        )
        try:
            with alone(self.device):
                result, state = self._geometry(func, schema, args, kwargs, step)
        except Exception:
            if position is not None:
                self._fail_random(func, schema, args, kwargs)
            raise
        if schema.fills:
            self._fast_path.remember_fill(func, args)
        if step.overwrites and any(tuple(t.size()) != ref.size for t, ref in zip(written, written_refs, strict=True)):
            # The operation resized an `out=`. The content behind its new end is still there.
            step.reads, step.overwrites = (*reads, *step.overwrites), ()
        outputs = tensors(result)
        if not all(map(is_plain, outputs)):
            # A result without a plain storage cannot be recorded. It becomes real at once.
            return self._run_unrecorded(step, generator)
        given = {id(tensor) for tensor in tensors((args, kwargs))}
        # Not the arguments. One may be a parameter, and `swap_tensors` refuses tensors that are held weakly.
        self.handed_out.extend(weakref.ref(output) for output in outputs if id(output) not in given)
        if not outputs and not written:
            return result
        created = []
        for output in outputs:
            if output.is_meta and self.tape.number(output) is None:
                created.append(self.tape.add_storage(output))
        if created or written:
            step.outputs = tuple(self.tape.ref(output) for output in outputs)
            step.creates = tuple(created)
            self.tape.append(step)
            if position is not None:
                assert generator is not None
                self.replayer.random.follow(generator, position, step, state)
        return result

    def _fail_random(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Repeat a failed random operation on real tensors, to leave the generator where an eager failure leaves it."""

        def real(leaf: Any) -> Any:
            return self.value(leaf).clone() if self._is_deferred(leaf) else leaf

        with suppress(Exception), torch.no_grad():
            self._run_random(func, schema, map_leaves(args, real), map_leaves(kwargs, real))

    def opaque(
        self, func: Callable[..., Tensor], tensor: Tensor, args: tuple[Any, ...], generator: torch.Generator | None
    ) -> Tensor:
        """Record a Python function that fills `tensor` with random numbers, if only a run tells how many it draws.

        Args:
            func: The function. A replay calls `func(tensor, *args, generator)` on a real tensor.
            tensor: The deferred tensor that it overwrites.
            args: Plain arguments.
            generator: An explicit generator, or None for the default one.
        """
        refuse_overlap([tensor])
        source = generator_for(self.device, generator)
        # Hidden from our own mode, which would replace a token that is read here by its true state.
        with torch._C.DisableTorchFunction():
            position = self.replayer.random.locate(source)
        if self.exposed.holds(tensor):
            source.set_state(self.replayer.random.state_at(position))
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                func(self.exposed.view(tensor), *args, generator)
        else:
            ref = self.tape.ref(tensor)
            step = self.tape.overwrite(ref, func, (ref, *args, generator), outputs=(ref,), position=position)
            with torch._C.DisableTorchFunction():
                self.replayer.random.follow(source, position, step)
        if not tensor.is_inference():
            # Autograd has to see a write: the values that it saved before are stale.
            torch._C._autograd._unsafe_set_version_counter((tensor,), (tensor._version + 1,))
        return tensor

    # -- values --------------------------------------------------------------------------------------------

    def random_state(self) -> Tensor:
        """Return the true state of the default generator."""
        random = self.replayer.random
        with turn, torch._C.DisableTorchFunction(), _disable_current_modes():
            return random.state_at(random.locate(default_generator(self.device))).clone()

    def value(self, tensor: Tensor) -> Tensor:
        """Return a real tensor with the value that a deferred tensor has now. It must not be written to."""
        with torch._C.DisableTorchFunction(), outside_inference_mode():
            return self.exposed.view(tensor) if self.exposed.holds(tensor) else self._values.of(tensor)

    def expose(self, tensor: Tensor) -> Tensor:
        """Return a real tensor that shares memory with a deferred one, from here on until the end."""
        with torch._C.DisableTorchFunction(), _disable_current_modes(), outside_inference_mode():
            if not self.exposed.holds(tensor):
                number = self.tape.number(tensor)
                assert number is not None, "not a deferred tensor of this tape"
                self.exposed.add(number, self._values.of_storage(number))
            return self.exposed.view(tensor)

    def adopt(self, real: Tensor) -> Tensor:
        """Return a deferred tensor that shares memory with a real one."""
        with torch._C.DisableTorchFunction(), _disable_current_modes(), outside_inference_mode():
            return self.exposed.adopt(real)

    def _geometry(
        self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any], step: Step
    ) -> tuple[Any, Tensor | None]:
        """Find the result's geometry. If that needs values, run the operation for real and keep only the geometry."""
        try:
            if schema.looks_at_values or self._mixes_devices(func, args, kwargs):
                raise NotImplementedError
            if not schema.wrong_on_meta and not is_doubtful(func, args, kwargs):
                return result_on_meta(func, args, kwargs, schema.fills), None
            if schema.is_random or not (schema.wrong_on_meta or torch.Tag.pointwise in func.tags):
                raise NotImplementedError
            result = result_on_stand_ins(func, args, kwargs)
            trust(func, args, kwargs)
            return result, None
        except Exception:
            # The meta kernel is missing, or values are needed, or the user made a mistake. The real run tells which.
            real_args, real_kwargs, result, state = self.replayer.execute_unrecorded(step)
            trust(func, args, kwargs)
            if not all(map(is_plain, tensors(result))):
                return result, state
            originals = dict(zip(map(id, tensors((real_args, real_kwargs))), tensors((args, kwargs)), strict=True))

            def counterpart(leaf: Any) -> Any:
                return originals.get(id(leaf), to_meta(leaf))

            return map_leaves(result, counterpart), state

    def _mixes_devices(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether some arguments are real tensors of another device. Most operations refuse them."""
        return (
            self.device.type != "cpu"
            and self.is_present
            and func is not aten.copy_.default
            and any(
                not tensor.is_meta and tensor.device.type != self.device.type and tensor.dim() > 0
                for tensor in tensors((args, kwargs))
            )
        )

    def _run_unrecorded(self, step: Step, generator: Generator | None) -> Any:
        _, _, result, state = self.replayer.execute_unrecorded(step)
        if generator is not None and state is not None:
            generator.set_state(state)
        return result

    def _reads(
        self, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any], written: tuple[TensorRef, ...]
    ) -> tuple[int, ...]:
        looked_at = (tensor for tensor in read_by(schema, args, kwargs) if not self.exposed.holds(tensor))
        return needed_by(self.tape, looked_at, written)

    def _locate(
        self, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Position | None, Generator | None]:
        if not schema.is_random:
            return None, None
        generator = self._generator(args, kwargs)
        return self.replayer.random.locate(generator), generator

    def _generator(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator:
        explicit = next((leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Generator)), None)
        return generator_for(self.device, explicit)

    # -- real tensors --------------------------------------------------------------------------------------

    def _adopted(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf if leaf.is_meta else self.adopt(leaf)
        if isinstance(leaf, torch.UntypedStorage) and leaf.device.type != "meta":
            whole = torch.empty(0, dtype=torch.uint8, device=leaf.device).set_(leaf)
            return self.adopt(whole).untyped_storage()
        return leaf

    def _resolve(self, leaf: Any) -> Any:
        return self.value(leaf) if self._is_deferred(leaf) else leaf

    def _is_deferred(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and self.tape.number(leaf) is not None

    def _capture(self, leaf: Any) -> Any:
        """Return the form of an argument that the tape keeps."""
        if isinstance(leaf, torch.device) and leaf.type == "meta":
            return self.device
        if not isinstance(leaf, Tensor):
            return leaf
        if self.exposed.holds(leaf):
            return Constant(self.exposed.view(leaf).clone())
        if self.tape.number(leaf) is not None:
            return self.tape.ref(leaf)
        if leaf.is_meta:
            raise NotImplementedError(
                f"a tensor of shape {tuple(leaf.shape)} on the meta device has no value that a deferred tensor could "
                "take. Make it on the device of the model."
            )
        return self._constants.of(leaf)

    def _run_plain(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation on real tensors."""
        self._constants.before_writes(written_by(schema, args, kwargs))
        return func(*args, **kwargs)

    def _run_random(self, func: Any, schema: OpSchema, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a random operation on a real tensor now, from the generator's true state."""
        written = written_by(schema, args, kwargs)
        self._constants.before_writes(written)
        generator: Generator | None = next(
            (leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Generator)), None
        )
        if generator is None:
            device = written[0].device if written else _device_of(args, kwargs)
            if device.type == "meta":
                return func(*args, **kwargs)
            generator = default_generator(device)
        program = self.replayer.random
        position = program.locate(generator)
        generator.set_state(program.state_at(position))
        # The state after this call is a true state. The next random step starts a new run from it.
        return func(*args, **kwargs)


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Return the device of an operation's result."""
    device: torch.device | None = kwargs.get("device")
    if device is None:
        device = next((tensor.device for tensor in tensors((args, kwargs))), None)
    return torch.device("cpu") if device is None else device
