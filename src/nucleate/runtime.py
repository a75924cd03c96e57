"""Runtime: owns an accelerator, a precision and a strategy, and offers what a training script calls.

It looks names up, composes its three peers and keeps the order of things. It knows no concrete plugin; what a
method means on a strategy or precision is theirs to decide.
"""

from __future__ import annotations

import builtins
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from nucleate.accelerators.base import Accelerator
from nucleate.cluster.agreement import share_generators, verify_same_model
from nucleate.cluster.communicator import Communicator
from nucleate.cluster.environment import Environment
from nucleate.cluster.numerics import Numerics
from nucleate.composition import Parts
from nucleate.deferred import Given, deferred, eager, is_recording, resumed
from nucleate.devices import made_current
from nucleate.errors import ConfigurationError, DeferredUseError, UsageError, name_list
from nucleate.integrations.active import Integrations
from nucleate.integrations.base import Integration
from nucleate.materialize import Plan, reset
from nucleate.materialize.block import Block
from nucleate.materialize.dependence import numerics_of
from nucleate.materialize.vacancies import adopt_vacancies, vacancies
from nucleate.materialize.verification import Verification
from nucleate.precision.base import Precision
from nucleate.report.meter import metered
from nucleate.seed import last_seed, seed_everything, seeds_workers
from nucleate.strategies.base import Strategy
from nucleate.wrappers.dataloader import DataLoaderWrapper, move, prepare
from nucleate.wrappers.module import ModuleWrapper, backward_allowed, refuse_set_up
from nucleate.wrappers.optimizer import OptimizerWrapper, check_optimizer, repoint

if TYPE_CHECKING:
    from nucleate.checkpoint import KeyMap, LoadReport
    from nucleate.checkpoint.saving import SaveHandle

T = TypeVar("T")


class Runtime:
    """Builds, loads and launches a model on one composition of accelerator, precision and strategy.

    Args:
        accelerator: `"auto"` (the accelerator that torch names as the current one, an installed plugin whose device is
            there, or the CPU), `"cpu"`, `"cuda"`, torch's name of any other kind of device, the name of an installed
            plugin, or an `Accelerator`.
        strategy: `"auto"` (DDP in several processes, else a single device), `"single_device"`, `"ddp"`, `"fsdp"`,
            the name of an installed plugin, or a `Strategy`.
        devices: How many processes each node must have; `"auto"` takes what the launcher started.
        num_nodes: How many nodes there must be.
        precision: `"32-true"`, `"64-true"`, `"bf16-true"`, `"16-true"`, `"bf16-mixed"`, `"16-mixed"`, the name of an
            installed plugin, or a `Precision`.
        plugins: Names of installed integrations, or `Integration` objects, which know how another library makes its
            models. None takes each that is installed and whose library has been imported when a model is constructed.
        verify: Let `setup` make parameters and buffers a second time, sequentially and whole, and compare them bit for
            bit with what it installed on this rank; and compare every element of what several ranks hold. True takes a
            sample of all kinds of recipes, of at most 2**24 elements; `"all"` takes everything. See
            `docs/concepts/exactness.md` for what it costs.

    Raises:
        PluginNotFoundError: No plugin of that kind has that name.
        ConfigurationError: The parts do not fit each other, the machine or the launched processes.

    Example:
        >>> import torch
        >>> from nucleate import Runtime
        >>> runtime = Runtime(accelerator="cpu")
        >>> with runtime.init_module(empty_init=True):
        ...     model = torch.nn.Linear(4, 2)
        >>> model = runtime.setup(model)
        >>> model(torch.ones(1, 4)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        *,
        accelerator: str | Accelerator = "auto",
        strategy: str | Strategy = "auto",
        devices: int | str = "auto",
        num_nodes: int = 1,
        precision: str | int | Precision = "32-true",
        plugins: Sequence[str | Integration] | None = None,
        verify: bool | str = False,
    ) -> None:
        if not isinstance(verify, bool) and verify != "all":
            raise ConfigurationError(f"verify={verify!r} must be False, True (a sample) or 'all'.")
        self._verify = verify
        environment = Environment.detect()
        environment.check_request(devices, num_nodes)
        self._parts = parts = Parts.choose(accelerator, precision, strategy, environment)
        self._accelerator, self._precision, self._strategy = parts.accelerator, parts.precision, parts.strategy
        self._environment, self._device = environment, parts.device
        self._communicator = Communicator(environment, parts.device)
        self._integrations = Integrations(plugins, parts.shown)
        self._launched = False
        # What has been set up: the original models.
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"Runtime({self._parts})"

    # -- what it is made of --------------------------------------------------------------------------------

    @property
    def accelerator(self) -> Accelerator:
        """The accelerator plugin."""
        return self._accelerator

    @property
    def precision(self) -> Precision:
        """The precision plugin."""
        return self._precision

    @property
    def strategy(self) -> Strategy:
        """The strategy plugin."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._device

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return self._environment.world_size

    @property
    def global_rank(self) -> int:
        """This process among all."""
        return self._environment.global_rank

    @property
    def local_rank(self) -> int:
        """This process among those of its node."""
        return self._environment.local_rank

    @property
    def node_rank(self) -> int:
        """This node among all."""
        return self._environment.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self._environment.global_rank == 0

    # -- start ---------------------------------------------------------------------------------------------

    def launch(self, function: Callable[..., T] | None = None, *args: Any, **kwargs: Any) -> T | None:
        """Start the process group; the processes themselves are torchrun's to start.

        Calling it is optional: the methods that need the group start it.

        Args:
            function: Called as `function(runtime, *args, **kwargs)` afterwards.
            args: Passed on.
            kwargs: Passed on.

        Returns:
            What `function` returns, or None without one.
        """
        if not self._launched:
            if self._strategy.distributed or self._environment.world_size > 1:
                from nucleate.cluster import process_group

                process_group.start(self._environment, self._accelerator.backend, self._strategy.timeout, self._device)
            self._strategy.connect(self._device, self._environment)
            self._integrations.connect()
            self._launched = True
        return function(self, *args, **kwargs) if function is not None else None

    @staticmethod
    def seed_everything(seed: int, workers: bool = True) -> int:
        """Seed Python, NumPy (where it is installed) and torch; see `nucleate.seed.seed_everything`."""
        return seed_everything(seed, workers)

    # -- construct -----------------------------------------------------------------------------------------

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Construct a model inside this context.

        The random generators are rank 0's on every rank, so that all ranks construct the same model whatever they
        were seeded with.

        Args:
            empty_init: True defers: nothing is allocated and `setup` makes each parameter where it will live. False
                makes real tensors at once, on the target device in the target dtype. None lets the strategy decide:
                those that shard defer. The others defer on a CPU where that is faster, which is from the first large
                weight on, and make everything when the block ends: afterwards nothing differs from False. Say True if
                weights will be loaded. The weights are bit-identical either way. Blocks nest: the innermost True or
                False counts. A model that is still deferred may be edited in a second block with True.
        """
        self.launch()
        decided = True if empty_init is None and self._strategy.shards else empty_init
        self._agree_on_generators()
        block = Block(self._device) if decided is None else None
        with ExitStack() as stack:
            stack.enter_context(made_current(self._device))
            for part in (self._accelerator, self._precision, self._strategy):
                stack.enter_context(part.module_init_context())
            if block is not None:
                stack.enter_context(block.construction())
            else:
                stack.enter_context(deferred(self._device) if decided else eager())
            for integration in self._integrations:
                stack.enter_context(integration.module_init_context())
            yield
        if block is not None:
            with metered(self.is_global_zero), made_current(self._device):
                block.make()

    @contextmanager
    def init_tensor(self) -> Iterator[None]:
        """Create tensors inside this context on the device, floating point ones in the precision's dtype."""
        self.launch()
        with (
            made_current(self._device),
            self._accelerator.module_init_context(),
            self._precision.module_init_context(),
        ):
            yield

    # -- set up --------------------------------------------------------------------------------------------

    @overload
    def setup(self, model: nn.Module) -> ModuleWrapper: ...

    @overload
    def setup(self, model: nn.Module, optimizer: Optimizer, /) -> tuple[ModuleWrapper, OptimizerWrapper]: ...

    @overload
    def setup(
        self, model: nn.Module, first: Optimizer, second: Optimizer, /
    ) -> tuple[ModuleWrapper, OptimizerWrapper, OptimizerWrapper]: ...

    @overload
    def setup(self, model: nn.Module, *optimizers: Optimizer) -> Any: ...

    def setup(self, model: nn.Module, *optimizers: Optimizer) -> Any:
        """Make everything that is deferred in a model, lay it out by the strategy, and wrap model and optimizers.

        A tensor that the constructor left empty, or that was built on the meta device by hand, is made by its module's
        `reset_parameters` or the like; see `docs/concepts/deferred.md`. Every rank then draws from the generators of
        rank 0. The log says at level `INFO` which method made which tensor.

        Args:
            model: The model, constructed inside `init_module` or not.
            optimizers: Optimizers built on its parameters, deferred or real. They keep training what they were built
                on, also where the strategy replaces the parameter objects.

        Returns:
            The wrapped model; with optimizers, a tuple of it and the wrapped optimizers.

        Raises:
            UsageError: The model or an optimizer was set up before.
            ConfigurationError: An optimizer has parameters of another model, or the strategy cannot take the model.
            UninitializedError: A parameter would be left without a value, because its module has no `reset_parameters`
                or the like that writes it.
            RankDisagreementError: The ranks constructed different models, or have CPUs, thread counts or torch builds
                that would make different bits of this one.
            VerificationError: With `verify`, what was made is not what the recipes make.
        """
        self.launch()
        with self._communicator.all_or_none("setup"):
            refuse_set_up(model, self._models)
            names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
            for optimizer in optimizers:
                check_optimizer(optimizer, names, model, self._strategy.shards)
            integrations = list(self._integrations)
            for integration in integrations:
                model = integration.setup(model)
            self._note_nothing_to_set_up(model)
            vacant = [vacancy.fqn for vacancy in vacancies(model)]
            facts = None if vacant else self._facts(model)
        self._compare_ranks(facts, vacant)
        if vacant:
            self._reset(model)
        with self._communicator.all_or_none("setup"):
            # While they are recorded, what the precision does to deferred parameters becomes part of their recipes.
            with resumed(model):
                model = self._precision.setup(model)
            model = self._accelerator.setup(model)
        # Apart from what precedes: a strategy exchanges tensors, and would wait for a rank that failed before.
        with self._communicator.all_or_none("setup"):
            verification = Verification(model, self._verify == "all", self._device) if self._verify else None
            with metered(self.is_global_zero), made_current(self._device):
                forward_module = self._strategy.setup(model)
            renewed = dict(model.named_parameters(remove_duplicate=False))
            for optimizer in optimizers:
                repoint(optimizer, names, renewed)
        if verification is not None:
            verification.run(self._communicator)
        wrapped = ModuleWrapper(forward_module, model, self._precision, self._strategy, self._device)
        for integration in integrations:
            for method in integration.inference_methods(model):
                wrapped.mark_inference_method(method)
        self._models.add(model)
        if not optimizers:
            return wrapped
        return (wrapped, *(OptimizerWrapper(optimizer, self._precision) for optimizer in optimizers))

    def setup_module(self, model: nn.Module) -> ModuleWrapper:
        """Set up a model without optimizers; see `setup`."""
        return self.setup(model)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Wrap optimizers that were built on the parameters of models that are set up.

        Returns:
            The wrapped optimizer, or a tuple of them if there are several.

        Raises:
            UsageError: An optimizer is set up already, or was built before its model was set up and so would train
                tensors that are no longer there.
        """
        if not optimizers:
            raise UsageError("setup_optimizers() was called without an optimizer.")
        for optimizer in optimizers:
            if isinstance(optimizer, OptimizerWrapper):
                raise UsageError("this optimizer has been set up already; use what was returned then.")
            known = {id(p) for model in self._models for p in model.parameters()}
            strangers = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
            if strangers:
                shapes = name_list(str(tuple(p.shape)) for p in strangers)
                raise UsageError(
                    f"{type(optimizer).__name__} has {len(strangers)} parameters (of shapes {shapes}) that belong to "
                    "no model that was set up: stepping it would train nothing. Build it after `setup`, from the "
                    "parameters of the model that `setup` returned, or pass both: `runtime.setup(model, optimizer)`."
                )
        wrapped = tuple(OptimizerWrapper(optimizer, self._precision) for optimizer in optimizers)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def setup_dataloaders(
        self, *loaders: DataLoader[Any], use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Split data loaders over the ranks and move their batches to the device.

        Args:
            loaders: The loaders. Each rank iterates over its own part, shuffled alike for every world size.
            use_distributed_sampler: Replace samplers; False leaves them to you.
            move_to_device: Move every tensor of a batch.

        Returns:
            The wrapped loader, or a tuple of them if there are several.
        """
        self.launch()
        if not loaders:
            raise UsageError("setup_dataloaders() was called without a data loader.")
        wrapped = tuple(self._wrap_loader(loader, use_distributed_sampler, move_to_device) for loader in loaders)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    # -- train ---------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """Compute gradients; use it instead of `loss.backward()`.

        Raises:
            DeferredUseError: The loss came from a model that was not set up.
        """
        if not isinstance(loss, Tensor):
            raise UsageError(f"backward() takes the loss, a tensor; got {type(loss).__name__}.")
        if loss.is_meta:
            raise DeferredUseError("this loss has no value: its model is deferred. Call `runtime.setup(model)` first.")
        with backward_allowed():
            self._strategy.backward(self._precision.scale(loss))

    def clip_gradients(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters, by value or by their norm over all ranks.

        Args:
            model: What `setup` returned.
            optimizer: What `setup` or `setup_optimizers` returned.
            clip_val: Limit each element to `[-clip_val, clip_val]`.
            max_norm: Scale all gradients so that their norm together is at most this.
            norm_type: The order of the norm, may be `inf`.
            error_if_nonfinite: Refuse a norm that is NaN or infinite before any gradient is changed. By default yes,
                except where the precision scales the loss: there an overflow is expected, and the step is skipped.

        Returns:
            The norm before clipping, equal on every rank, or None when clipping by value.

        Raises:
            ConfigurationError: Not exactly one of `clip_val` and `max_norm` was given, or it is negative.
            NonFiniteGradientError: See `error_if_nonfinite`.
        """
        from nucleate.strategies.clip import clip_by_norm, clip_by_value

        if (clip_val is None) == (max_norm is None):
            raise ConfigurationError(
                f"give exactly one of clip_val and max_norm, not clip_val={clip_val!r} and max_norm={max_norm!r}."
            )
        inner = optimizer.optimizer if isinstance(optimizer, OptimizerWrapper) else optimizer
        self._precision.unscale(inner)
        if error_if_nonfinite is None:
            error_if_nonfinite = not self._precision.scales_gradients
        parameters = [p for group in inner.param_groups for p in group["params"]]
        if max_norm is not None:
            return clip_by_norm(parameters, max_norm, norm_type, error_if_nonfinite)
        assert clip_val is not None
        clip_by_value(parameters, clip_val)
        return None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context that surrounds forward, for computing outside of a model."""
        return self._precision.forward_context()

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> Iterator[None]:
        """Accumulate gradients without exchanging them, for all but the last backward of a step.

        Args:
            module: What `setup` returned.
            enabled: False does nothing, so that the context can stand in a loop: `enabled=is_accumulating`.

        Raises:
            UsageError: The module was not set up.
        """
        if not isinstance(module, ModuleWrapper):
            raise UsageError(
                f"no_backward_sync takes the model that `setup` returned, not {type(module).__name__}. Set it up first."
            )
        with ExitStack() as stack:
            if enabled:
                stack.enter_context(self._strategy.no_backward_sync(module.forward_module))
            yield

    # -- ranks ---------------------------------------------------------------------------------------------

    def to_device(self, obj: T) -> T:
        """Move a module, a tensor or every tensor of a collection to the device."""
        if isinstance(obj, nn.Module):
            return cast(T, self._accelerator.setup(obj))
        return cast(T, move(obj, self._device))

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only."""
        if self.is_global_zero:
            builtins.print(*args, **kwargs)  # noqa: T201

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.launch()
        self._communicator.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank `src`'s object on every rank; see `Communicator.broadcast`."""
        self.launch()
        return self._communicator.broadcast(obj, src)

    def all_gather(self, data: Any, sync_grads: bool = False) -> Any:
        """Return every rank's tensors stacked along a new leading axis `(world_size, ...)`."""
        self.launch()
        return self._communicator.all_gather(data, sync_grads)

    def all_reduce(self, data: Any, reduce_op: str = "mean") -> Any:
        """Return the combination of every rank's tensors; see `Communicator.all_reduce`."""
        self.launch()
        return self._communicator.all_reduce(data, reduce_op)

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Let rank 0 go through the block before the others, for example to prepare a file that all then read."""
        self.launch()
        if not self.is_global_zero:
            self._communicator.barrier()
        try:
            yield
        finally:
            # Also when rank 0 raised: the others go on and end with it, they do not wait.
            if self.is_global_zero:
                self._communicator.barrier()

    # -- checkpoints ---------------------------------------------------------------------------------------

    def save(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | nn.Module,
        *,
        format: str | None = None,
        filter: Mapping[str, Callable[[str, Any], bool]] | Callable[[str, Any], bool] | None = None,
        max_shard_size: int | str = "5GB",
        asynchronous: bool = False,
        keep_last: int | str | None = None,
        keys: KeyMap | None = None,
    ) -> SaveHandle | None:
        """Write a training state, or one model, to a folder or a file; every rank calls it.

        It is whole or absent, whatever moment a process is killed at. See `nucleate.checkpoint.save`.

        Args:
            path: `.safetensors`, `.pt`, `.pth`, `.bin` and `.ckpt` stand for one file, any other name for a folder.
            state: Modules, optimizers, objects with a `state_dict`, tensors and plain values by name; or one module.
            format: Of a folder: `"dcp"` (the default) or `"safetensors"`, which Hugging Face's libraries read; or the
                name of an installed writer.
            filter: Name in `state` to a function of key and value that says what of it is saved.
            max_shard_size: How large the files of a safetensors folder may be.
            asynchronous: Return once the state is copied to CPU memory, and write in the background.
            keep_last: Keep that many checkpoints beside one another, and a pointer `latest` to the newest.
            keys: Other names in the checkpoint, and rules, where the state is one module; see `load_raw`.

        Returns:
            With `asynchronous`, a handle to wait for; else None.
        """
        from nucleate.checkpoint import save

        self.launch()
        with metered(self.is_global_zero):
            return save(
                path,
                state,
                self._communicator,
                format=format,
                filter=filter,
                max_shard_size=max_shard_size,
                asynchronous=asynchronous,
                keep_last=keep_last,
                keys=keys,
            )

    def load(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | nn.Module | None = None,
        strict: bool = True,
        *,
        remainder: bool | None = None,
        reader: str | None = None,
    ) -> LoadReport:
        """Read a checkpoint into `state`, in place. See `nucleate.checkpoint.load`.

        Args:
            path: What was given to `save`.
            state: What to load into, as it was given to `save`, or a part of it.
            strict: Refuse keys that are missing, unexpected or of another shape inside of what is asked for.
            remainder: Return what `state` does not ask for, too, whole on every rank. By default only without a
                `state`: no rank should hold an optimizer's state that it does not own only because it loads a model.
            reader: The format's name, where it cannot be told from the files.

        Returns:
            What was loaded, missing, and so on; as a dict, the remainder.
        """
        from nucleate.checkpoint import load

        self.launch()
        wanted = state is None if remainder is None else remainder
        with metered(self.is_global_zero):
            return load(
                path,
                state,
                self._communicator,
                strict=strict,
                remainder=wanted,
                reader=reader,
                prepare=self._prepare_to_load,
            )

    def load_raw(
        self,
        path: str | PathLike[str],
        model: nn.Module,
        strict: bool = True,
        *,
        prefix: str = "",
        keys: KeyMap | None = None,
        reader: str | None = None,
        mmap: bool = False,
    ) -> LoadReport:
        """Load a model's weights from a file or folder of any format. See `nucleate.checkpoint.load_raw`.

        A deferred model is bound to the files, and `setup` reads of each tensor what this rank owns; any other model is
        filled in place.

        Args:
            path: A safetensors or torch file, a Hugging Face folder, a folder of torch.distributed.checkpoint, or what
                `save` wrote.
            model: The model, deferred, real or set up.
            strict: Refuse keys that are missing, unexpected or of another shape. Otherwise deferred tensors that are
                missing are made by their recipes.
            prefix: Only the keys that begin with this, without it.
            keys: Other names for keys: a dict of regular expressions and replacements, a function, a rule that renames,
                joins, splits or transposes tensors (`nucleate.checkpoint.rename`, ...), or a list of these.
            reader: The format's name, where it cannot be told from the files.
            mmap: Let deferred tensors on the CPU lie in the file's own pages where they can.

        Returns:
            What was loaded, missing, unexpected, mismatched, cast and tied.
        """
        from nucleate.checkpoint import load_raw

        self.launch()
        with metered(self.is_global_zero):
            return load_raw(
                path,
                model,
                self._communicator,
                strict,
                prefix=prefix,
                keys=keys,
                reader=reader,
                mmap=mmap,
                prepare=self._prepare_to_load,
            )

    # -- inside --------------------------------------------------------------------------------------------

    def _prepare_to_load(self, model: nn.Module, stored: Mapping[str, Given]) -> None:
        """Let the precision give a model the form of what is loaded, as long as it is not set up."""
        if not isinstance(model, ModuleWrapper) and model not in self._models:
            if not is_recording():
                # What was built on the meta device by hand is bound to files as deferred tensors are.
                adopt_vacancies(model, self._device)
            with resumed(model):
                self._precision.before_load(model, stored)

    def _agree_on_generators(self) -> None:
        """Give every rank the generator states of rank 0."""
        if self.world_size == 1 or is_recording():
            # Inside another `init_module` the ranks agree, and the states are places in a recording.
            return
        share_generators(self._communicator, self._accelerator.random_state, self._accelerator.set_random_state)

    def _facts(self, model: nn.Module) -> tuple[str, Numerics | None]:
        """Return a fingerprint of the recipes of a model, and what their bits depend on if there are other ranks."""
        # The plan lists the tensors as they are now, so it is not kept.
        plan = Plan.of(model)
        plan.check_device(self._device)
        return (plan.digest(), numerics_of(plan, self._device)) if self.world_size > 1 else ("", None)

    def _compare_ranks(self, facts: tuple[str, Numerics | None] | None, vacant: Sequence[str] = ()) -> None:
        """Compare what `_facts` returned, and which tensors have no recipe, between the ranks."""
        if self.world_size > 1:
            digest, numerics = facts or ("", None)
            settings = {"verify": self._verify, "precision": repr(self._precision)}
            settings["the list of tensors without a recipe"] = name_list(vacant)
            verify_same_model(digest, self._communicator, numerics, settings)

    def _reset(self, model: nn.Module) -> None:
        """Give recipes to what has none; every rank has found the same tensors."""
        self._agree_on_generators()
        with self._communicator.all_or_none("setup"):
            resets = reset(model, self._device)
            if self.is_global_zero:
                resets.report()
            facts = self._facts(model)
        self._compare_ranks(facts)

    def _note_nothing_to_set_up(self, model: nn.Module) -> None:
        """Warn of a model without parameters and buffers; it is set up all the same, as a loss function may be."""
        held = (*model.parameters(), *model.buffers())
        if not held and self.is_global_zero:
            warnings.warn(
                f"setup: {type(model).__name__} has no parameter and no buffer. There is nothing to create, to shard "
                "or to train; only its forward gets the precision's casts.",
                stacklevel=3,
            )

    def _wrap_loader(self, loader: DataLoader[Any], use_sampler: bool, move_to_device: bool) -> DataLoaderWrapper:
        return prepare(
            loader,
            num_replicas=self._strategy.data_parallel_size,
            rank=self._strategy.data_parallel_rank,
            device=self._device if move_to_device else None,
            seed=self._communicator.broadcast(torch.initial_seed()),
            seed_workers=last_seed() is None or seeds_workers(),
            use_distributed_sampler=use_sampler,
        )
