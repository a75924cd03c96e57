"""The class `Runtime`: an accelerator, a precision and a strategy, and the methods that a training script calls.

The runtime looks names up, combines the three plugins and decides the order of the steps. It does not know any concrete
plugin. Strategies and precisions decide how they carry out a step.
"""

from __future__ import annotations

import builtins
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from nucleate.accelerators.base import Accelerator
from nucleate.callbacks import Callbacks
from nucleate.cluster import started_rank
from nucleate.cluster.communicator import Communicator
from nucleate.cluster.device_request import DeviceRequest
from nucleate.cluster.environment import Environment
from nucleate.composition import Components, choose_loggers
from nucleate.deferred import ElementSource, deferred, eager, is_recording, outside_inference_mode, resumed
from nucleate.devices import made_current
from nucleate.errors import ConfigurationError, DeferredUseError, UsageError
from nucleate.integrations.active import Integrations
from nucleate.layout import Layout, LiveLayout
from nucleate.materialize.block import Block
from nucleate.materialize.inference_tensors import replace_inference_tensors
from nucleate.materialize.vacancies import adopt_vacancies
from nucleate.model_setup import ModelSetup, agree_on_generators
from nucleate.plugin_choices import PluginChoices, PluginInput
from nucleate.precision.base import Precision
from nucleate.report.meter import metered
from nucleate.seed import last_seed, seed_everything, seeds_workers
from nucleate.shells import inside, without_shells
from nucleate.strategies.base import Strategy
from nucleate.strategies.clip import refuse_limits
from nucleate.wrappers.accumulation import Accumulation
from nucleate.wrappers.dataloader import DataLoaderWrapper, move, prepare
from nucleate.wrappers.deliveries import Deliveries
from nucleate.wrappers.free_parameters import FreeParameters, known_ids
from nucleate.wrappers.module import ModuleWrapper
from nucleate.wrappers.optimizer import OptimizerWrapper, RuntimeLinks
from nucleate.wrappers.running import launched_first
from nucleate.wrappers.scaled_backward import backward_allowed
from nucleate.wrappers.termination import Termination, repeatable

if TYPE_CHECKING:
    from nucleate.checkpoint import KeyMap, LoadReport
    from nucleate.checkpoint.saving import SaveHandle

T = TypeVar("T")

#: The mark of an argument that was not given.
_NOTHING: Any = object()


class Runtime:
    """The builder, loader and launcher of models on one accelerator, precision and strategy.

    Args:
        accelerator: `"auto"` (torch's current accelerator, an installed plugin whose device is there, or the CPU),
            `"gpu"` (the same without the CPU), `"cpu"`, `"cuda"`, torch's name of any other kind of device, the name of
            an installed plugin, or an `Accelerator`. None is `"auto"`. Names may be in upper case.
        strategy: `"auto"` (DDP in several processes, else a single device), `"single_device"`, `"ddp"`, `"fsdp"`,
            the name of an installed plugin, or a `Strategy`. None is `"auto"`. Names may be in upper case.
        devices: The number of processes on each node. `"auto"` and None accept the number that a launcher such as
            torchrun started, and mean one process without a launcher. -1 means one process on each device; processes
            share the CPU, so there -1 means one. `[0, 2]` and `"0,2"` name the device of each process. If several are
            asked for and no launcher has started them, `launch` starts them.
        num_nodes: The number of nodes that the run must have. Several nodes need torchrun.
        precision: None, the default, casts nothing: parameters, buffers, inputs and outputs keep the dtypes that the
            constructor and the user chose. `"32-true"`, `"64-true"`, `"bf16-true"`, `"16-true"`, `"bf16-mixed"`,
            `"16-mixed"`, the name of an installed plugin, or a `Precision` casts as its page says.
        plugins: One plugin or several: a `Precision`, an `Environment` that takes the place of the launcher's
            variables, readers and writers of checkpoints, and integrations or their names, which know how another
            library makes its models. Without an integration in the list, every installed one is active whose library
            is imported when a model is constructed. A list with integrations names all that are active, beside those
            of nucleate itself.
        callbacks: One callback or several: any objects, whose methods `call` calls, or names of installed callbacks.
        loggers: Where `log` and `log_dict` write, on rank 0: a logger or a list of them. A logger is `"csv"`,
            `"tensorboard"`, `"wandb"`, `"mlflow"`, the name of an installed plugin, a `nucleate.loggers.Logger`, or any
            object with a method `log_metrics(metrics, step)`, such as a logger of Lightning Fabric.
        verify: Whether `setup` makes parameters and buffers a second time, sequentially and whole, and compares them
            bit for bit with the tensors that it installed on this rank. `setup` then also compares every element that
            several ranks hold. True takes a sample of all kinds of recipes, of at most 2**24 elements. `"all"` takes
            everything. `docs/concepts/exactness.md` describes the costs.
        max_restarts: How often all processes start again after a failure, if this runtime starts them because of
            `devices`. Under a launcher it has no effect: the launcher counts its own restarts. The script or function
            begins anew, and loads its last checkpoint.
        on_sigterm: The reaction to SIGTERM, which schedulers send before they end a job. `"save"` repeats the last
            `save` after the present optimizer step, on all ranks, and ends them with the exit code 143. A function is
            called there instead, with the runtime as its argument. None leaves the signal alone. See
            `docs/how-to/restarts.md`.

    Raises:
        PluginNotFoundError: No plugin of that kind has that name.
        ConfigurationError: The plugins do not fit each other, the machine or the launched processes.

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

    # Whether this process has started ranks.
    _has_supervised = False
    _renewed: frozenset[str] = frozenset()

    def __init__(  # noqa: PLR0913 - the arguments that Lightning Fabric has too
        self,
        *,
        accelerator: str | Accelerator | None = "auto",
        strategy: str | Strategy | None = "auto",
        devices: int | str | Sequence[int] | None = "auto",
        num_nodes: int = 1,
        precision: str | int | Precision | None = None,
        plugins: PluginInput | Iterable[PluginInput] | None = None,
        callbacks: object = None,
        loggers: Any = None,
        verify: bool | str = False,
        max_restarts: int = 0,
        on_sigterm: str | Callable[[Any], Any] | None = None,
    ) -> None:
        # All arguments, for `_renew`.
        self._settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        kept = set(vars(self)) - self._renewed
        if not isinstance(verify, bool) and verify != "all":
            raise ConfigurationError(f"verify={verify!r} must be False, True (a sample) or 'all'.")
        self._verify = verify
        self._plugins = choices = PluginChoices.of(plugins, precision)
        self._callbacks = Callbacks.of(callbacks)
        self._deliveries = Deliveries()
        self._termination = Termination(on_sigterm, self._deliveries)
        request = DeviceRequest.parse(devices, num_nodes, max_restarts)
        environment = choices.environment or Environment.detect()
        self._parts = parts = Components.choose(accelerator, choices.precision, strategy, environment, request)
        environment = parts.environment
        started_rank.join()
        self._accelerator, self._precision, self._strategy = parts.accelerator, parts.precision, parts.strategy
        self._environment, self._device = environment, parts.device
        self._communicator = Communicator(environment, parts.device)
        self._free = FreeParameters(self._communicator)
        self._integrations = Integrations(choices.integrations, parts.shown)
        self._loggers = choose_loggers(loggers, self.is_global_zero)
        self._launched = False
        # The models that were set up, without shells.
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._accumulation = Accumulation(self._deliveries, self._models)
        # `_renew` makes these again.
        self._renewed = frozenset(vars(self)) - kept

    def __repr__(self) -> str:
        return f"Runtime({self._parts})"

    # -- parts ---------------------------------------------------------------------------------------------

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
    def callbacks(self) -> list[Any]:
        """The callbacks, in the order in which `call` calls them. The list is a copy."""
        return list(self._callbacks)

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._device

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._environment.world_size

    @property
    def global_rank(self) -> int:
        """The rank of this process."""
        return self._environment.global_rank

    @property
    def local_rank(self) -> int:
        """The number of this process among the processes of its node."""
        return self._environment.local_rank

    @property
    def node_rank(self) -> int:
        """The number of this node among all nodes."""
        return self._environment.node_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is rank 0, which prints and writes."""
        return self._environment.global_rank == 0

    # -- start ---------------------------------------------------------------------------------------------

    @overload
    def launch(self) -> None: ...

    @overload
    def launch(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T: ...

    def launch(self, function: Any = _NOTHING, *args: Any, **kwargs: Any) -> Any:
        """Start the process group, and before it the processes that `devices` asks for, if no launcher has.

        You need not call this method: the methods that need the group call it without a function.

        Without a function, the script runs again in each of the processes. This process waits for them and ends with
        their exit code, so nothing below this line runs in it. With a function, the processes run that function.

        Args:
            function: A function to call afterwards, as `function(runtime, *args, **kwargs)`.
            args: Positional arguments of `function`.
            kwargs: Keyword arguments of `function`.

        Returns:
            The result of `function`: that of this process, or of rank 0 if this process started the ranks. None without
            a function.

        Raises:
            UsageError: `function` is not a function, or the processes cannot be started from here.
            RankFailedError: A process failed that this process has started.
        """
        if function is not _NOTHING and not callable(function):
            raise UsageError(
                f"launch() takes a function, not {type(function).__name__}. Pass the function without calling it: "
                "`launch(main)`, not `launch(main(runtime))`."
            )
        if self._environment.is_planned:
            return self._start_ranks(function, args, kwargs)
        if not self._launched:
            if self._strategy.distributed or self._environment.world_size > 1:
                from nucleate.cluster import process_group

                process_group.start(self._environment, self._parts.backend, self._strategy.timeout, self._device)
            self._strategy.connect(self._device, self._environment)
            self._integrations.connect()
            if self._loggers is not None:
                self._loggers.connect(self._communicator)
            self._launched = True
            self._termination.start(self, self._communicator)
        return function(self, *args, **kwargs) if function is not _NOTHING else None

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call a method of every callback that has it, in their order.

        Args:
            hook_name: The name of the method. It may be any name.
            args: Positional arguments of the method.
            kwargs: Keyword arguments of the method. A method that does not name one of them does not get it.

        Raises:
            UsageError: A callback has the name, but it is not a method.
        """
        self._callbacks.call(hook_name, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do nothing, unless a subclass of `Runtime` has a method `run` of its own.

        A call of that method first does what `launch` does: it is `runtime.launch(method, *args, **kwargs)`.

        Args:
            args: The arguments that the subclass chooses.
            kwargs: The keyword arguments that the subclass chooses.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if callable(run := vars(cls).get("run")):
            cls.run = launched_first(run)  # type: ignore[method-assign]

    @staticmethod
    def seed_everything(seed: int | None = None, workers: bool | None = None, verbose: bool = True) -> int:
        """Seed Python, NumPy (if it is installed) and torch; see `nucleate.seed.seed_everything`."""
        return seed_everything(seed, workers, verbose)

    # -- construct -----------------------------------------------------------------------------------------

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Construct a model inside this context.

        Every rank gets the states of rank 0's random generators. So all ranks construct the same model, whatever their
        seeds are. In inference mode the block makes the tensors that it makes in `torch.no_grad()`, so the model can be
        trained afterwards.

        Args:
            empty_init: True defers: nothing is allocated, and `setup` makes each parameter in its final place. False
                makes real tensors at once, on the target device in the target dtype. None lets the strategy decide. A
                strategy that shards defers. Any other strategy defers on a CPU from the first large weight on, where
                that is faster, and makes everything when the block ends; afterwards nothing differs from False. Pass
                True if you load weights afterwards. The weights are bit-identical in all cases. Blocks nest: the
                innermost True or False counts. A second block with True allows edits of a model that is still
                deferred.
        """
        self.launch()
        decided = True if empty_init is None and self._strategy.shards else empty_init
        agree_on_generators(self._communicator, self._accelerator)
        block = Block(self._device) if decided is None else None
        with ExitStack() as stack:
            stack.enter_context(outside_inference_mode())
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

    def sharded_model(self) -> AbstractContextManager[None]:
        """Return `init_module()`. Lightning Fabric has this name too, and has deprecated it."""
        return self.init_module()

    @contextmanager
    def init_tensor(self) -> Iterator[None]:
        """Create tensors on the device inside this context. Floating point tensors get the precision's dtype."""
        self.launch()
        with (
            made_current(self._device),
            self._accelerator.module_init_context(),
            self._precision.module_init_context(),
        ):
            yield

    # -- set up --------------------------------------------------------------------------------------------

    @overload
    def setup(
        self, module: nn.Module, *, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> ModuleWrapper: ...

    @overload
    def setup(
        self,
        module: nn.Module,
        first: Optimizer,
        /,
        *,
        scheduler: None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> tuple[ModuleWrapper, OptimizerWrapper]: ...

    @overload
    def setup(
        self,
        module: nn.Module,
        first: Optimizer,
        second: Optimizer,
        /,
        *,
        scheduler: None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> tuple[ModuleWrapper, OptimizerWrapper, OptimizerWrapper]: ...

    @overload
    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: LRScheduler | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any: ...

    @outside_inference_mode()
    def setup(
        self,
        module: nn.Module,
        *optimizers: Optimizer,
        scheduler: LRScheduler | None = None,
        move_to_device: bool = True,
        _reapply_compile: bool = True,
    ) -> Any:
        """Materialize a model, lay it out by the strategy, and wrap the model and the optimizers.

        If the constructor left a tensor empty, or the tensor was built on the meta device by hand, its module's
        `reset_parameters` or the like makes its value; see `docs/concepts/deferred.md`. Every rank then draws from rank
        0's generators. The log names at level `INFO` the method that made each of these tensors.

        Args:
            module: The model, constructed inside `init_module` or not.
            optimizers: Optimizers on the model's deferred or real parameters. They keep training the same parameters,
                even if the strategy replaces the parameter objects. They may also have parameters that no model has;
                see `setup_optimizers`.
            scheduler: A learning rate scheduler of one of the optimizers, which is returned as it is.
            move_to_device: Whether to move real tensors to the device of the runtime. With False they stay where they
                are, which strategies of several processes refuse for tensors elsewhere. Deferred tensors are made on
                the device of the runtime in any case.
            _reapply_compile: Whether a model that `torch.compile` returned is compiled again after the strategy has
                wrapped it. With False it then runs without compilation.

        Returns:
            The wrapped model. With optimizers, a tuple of the wrapped model, the wrapped optimizers and, if there is
            one, the scheduler.

        Raises:
            UsageError: The model or an optimizer was set up before, or they have parameters that an earlier `setup` has
                replaced.
            ConfigurationError: An optimizer has parameters of another model, or the strategy cannot take the model or
                step the optimizer. Or there is a scheduler and no optimizer.
            UninitializedError: A parameter would be left without a value, because its module has no `reset_parameters`
                or the like that writes it. Or a parameter of a lazy module has no shape yet.
            RankDisagreementError: The ranks constructed different models, or have CPUs, thread counts or torch builds
                that would make different bits of this model.
            VerificationError: With `verify`, an installed tensor differs from the value that its recipe makes.
        """
        if scheduler is not None and not optimizers:
            raise ConfigurationError("setup() got a scheduler without its optimizer. Pass the optimizer before it.")
        self.launch()
        setup = ModelSetup(self._parts, self._communicator, self._integrations, self._verify, self._free)
        wrapped = setup.run(module, optimizers, self._models, move_to_device, _reapply_compile)
        self._models.add(inside(wrapped.module))
        self.call("on_after_setup", runtime=self, fabric=self, module=wrapped)
        last = () if scheduler is None else (scheduler,)
        return (wrapped, *map(self._wrap_optimizer, optimizers), *last) if optimizers else wrapped

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> ModuleWrapper:
        """Set up a model without optimizers; see `setup`."""
        return self.setup(module, move_to_device=move_to_device, _reapply_compile=_reapply_compile)

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Wrap optimizers on the parameters of models that are set up. Every rank calls this method.

        An optimizer may also have parameters that no model has, such as a learned temperature. All ranks take rank 0's
        values. Each step averages the gradients over the ranks. The values are saved with the optimizer.

        Returns:
            The wrapped optimizer, or a tuple of them if there are several.

        Raises:
            UsageError: An optimizer is set up already, or it has parameters that `setup` has replaced in their model,
                that have no value yet, or that no model has and that are not on the device of the runtime.
            ConfigurationError: The strategy cannot step an optimizer.
            RankDisagreementError: The ranks have parameters of different shapes that no model has.
        """
        self.launch()
        if not optimizers:
            raise UsageError("setup_optimizers() was called without an optimizer.")
        with self._communicator.all_or_none("setup_optimizers"):
            for model in self._models:
                LiveLayout.of(model).check()
            found = [self._check_optimizer(optimizer) for optimizer in optimizers]
        self._free.agree(found)
        for optimizer, free in zip(optimizers, found, strict=True):
            self._strategy.setup_optimizer(optimizer)
            self._free.add(optimizer, free)
        wrapped = tuple(map(self._wrap_optimizer, optimizers))
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def setup_dataloaders(
        self, *loaders: DataLoader[Any], use_distributed_sampler: bool = True, move_to_device: bool = True
    ) -> Any:
        """Split data loaders over the ranks and move their batches to the device.

        Args:
            loaders: The loaders. Each rank iterates over its own part. The data is shuffled alike for every world size.
            use_distributed_sampler: Whether to replace samplers. With False, split the data yourself.
            move_to_device: Whether to move every tensor of a batch.

        Returns:
            The wrapped loader, or a tuple of them if there are several.
        """
        self.launch()
        if not loaders:
            raise UsageError("setup_dataloaders() was called without a data loader.")
        wrapped = tuple(self._wrap_loader(loader, use_distributed_sampler, move_to_device) for loader in loaders)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    # -- train ---------------------------------------------------------------------------------------------

    def backward(self, tensor: Tensor, *args: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Compute gradients. Call this method instead of `loss.backward()`.

        Args:
            tensor: The loss.
            args: Positional arguments of `torch.Tensor.backward`.
            model: The model that `setup` returned. No strategy of the core needs it; one with an engine for each model
                may.
            kwargs: Keyword arguments of `torch.Tensor.backward`, such as `retain_graph=True` or `create_graph=True`.

        Raises:
            DeferredUseError: The loss came from a model that was not set up.
            UsageError: The loss is not a tensor, or `model` was not set up.
        """
        if not isinstance(tensor, Tensor):
            raise UsageError(f"backward() takes the loss, a tensor; got {type(tensor).__name__}.")
        if tensor.is_meta:
            raise DeferredUseError("this loss has no value: its model is deferred. Call `runtime.setup(model)` first.")
        if model is not None and not any(True for _ in self._live_in(model)):
            raise UsageError(f"backward(model=...) takes a model that was set up, not this {type(model).__name__}.")
        for known in self._models:
            LiveLayout.of(known).check_once()
        with backward_allowed(), self._strategy.step_context():
            self._strategy.backward(self._precision.scale(self._accumulation.divided(tensor)), *args, **kwargs)

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool | None = None,
    ) -> Tensor | None:
        """Clip the gradients of an optimizer's parameters, by value or by their norm over all ranks.

        Args:
            module: The model that `setup` returned.
            optimizer: The optimizer that `setup` or `setup_optimizers` returned.
            clip_val: Limit each element to `[-clip_val, clip_val]`, and each part of a complex element.
            max_norm: Scale all gradients so that the norm of all together is at most this number.
            norm_type: The order of the norm; it may be `inf`.
            error_if_nonfinite: Raise an error before any gradient changes if the norm is NaN or infinite. None means
                True, unless the precision scales the loss: then overflows are expected, and the step is skipped.

        Returns:
            The norm before clipping, equal on every rank. None when clipping by value, and inside `accumulate` before
            the last micro-batch, where nothing is clipped.

        Raises:
            ConfigurationError: Both or neither of `clip_val` and `max_norm` were given, or the limit is negative.
            NonFiniteGradientError: The norm is NaN or infinite; see `error_if_nonfinite`.
        """
        if (clip_val is None) == (max_norm is None):
            raise ConfigurationError(
                f"give exactly one of clip_val and max_norm, not clip_val={clip_val!r} and max_norm={max_norm!r}."
            )
        for live in self._live_in(module):
            live.refuse_emptied("clip_gradients")
        inner = optimizer.optimizer if isinstance(optimizer, OptimizerWrapper) else optimizer
        refuse_limits(max_norm=max_norm, norm_type=norm_type, clip_val=clip_val)
        if self._accumulation.holds(inner):
            return None
        self._accumulation.complete(inner)
        self._free.average(inner)
        self._precision.unscale(inner)
        if error_if_nonfinite is None:
            error_if_nonfinite = not self._precision.scales_gradients
        parameters = [p for group in inner.param_groups for p in group["params"]]
        return self._strategy.clip_gradients(
            parameters,
            max_norm=max_norm,
            norm_type=norm_type,
            clip_val=clip_val,
            error_if_nonfinite=error_if_nonfinite,
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Return the precision's context for a forward pass, for computation outside of a model."""
        return self._precision.forward_context()

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool = True) -> Iterator[None]:
        """Accumulate gradients without exchanging them, for every backward of a step except the last.

        Args:
            module: The model that `setup` returned.
            enabled: Whether the context does anything. A loop can pass `enabled=is_accumulating`.

        Raises:
            UsageError: The module was not set up.
        """
        model = self._set_up(module, "no_backward_sync")
        with ExitStack() as stack:
            if enabled:
                stack.enter_context(self._strategy.no_backward_sync(model.forward_module))
            yield

    @contextmanager
    def accumulate(self, *models: nn.Module, every: int, last: bool | None = None) -> Iterator[bool]:
        """Surround the forward, backward and step of one micro-batch. Several micro-batches make a step.

        The block counts. Before the last micro-batch of a step, gradients are not exchanged, and `clip_gradients` and
        the `step` of the models' optimizers do nothing. `zero_grad` never clears gradients that the next step needs.
        `backward` divides each loss by the number of micro-batches, so the gradients are those of one large batch whose
        loss is a mean. The last batch of an epoch makes a step too, with the average of fewer micro-batches.

        Args:
            models: The models that `setup` returned and that train together.
            every: The number of micro-batches of a step.
            last: Whether this micro-batch is the last of its step, whatever the count is. None asks the loader of
                `setup_dataloaders` that has delivered the batch; a stream has no length, so pass the flag there. False
                does not ask: pass it if you split the batches of a loader into micro-batches.

        Yields:
            Whether this micro-batch is the last of its step, for example to step a scheduler.

        Raises:
            ConfigurationError: `every` is not a positive integer.
            UsageError: A model was not set up, the block is inside another one, or several blocks share a batch of a
                loader and `last` is None.
        """
        originals = [inside(self._set_up(model, "accumulate").module) for model in models]
        if not models:
            raise UsageError("accumulate() was called without a model.")
        with ExitStack() as stack:
            is_last = stack.enter_context(self._accumulation.micro_batch(originals, every, last))
            for model in models:
                stack.enter_context(self.no_backward_sync(model, enabled=not is_last))
            yield is_last

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

    def barrier(self, name: str | None = None) -> None:
        """Wait until every rank has called this method.

        Args:
            name: A name for the readers of the script. It has no effect.
        """
        self.launch()
        self._communicator.barrier()

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return rank `src`'s object on every rank; see `Communicator.broadcast`."""
        self.launch()
        return self._communicator.broadcast(obj, src)

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return every rank's tensors stacked along a new leading axis; see `Communicator.all_gather`."""
        self.launch()
        return self._communicator.all_gather(data, sync_grads, group)

    def gather_for_metrics(
        self, data: Any, *, loader: DataLoaderWrapper | None = None, use_gather_object: bool = False
    ) -> Any:
        """Return the results of all ranks for the samples of a batch, each sample once, in the sampler's order.

        A sampler repeats samples where their number does not divide by the number of ranks. They are left out here. So
        metrics over an epoch are those of one process. Call it in the loop over a loader of `setup_dataloaders` with
        the results of a batch, or after the loop with those of all batches.

        Args:
            data: A tensor with a row for each sample, or dicts, lists, tuples and dataclasses of such tensors. A list
                of plain values, such as texts, has one for each sample too. A number, or a tensor without a dimension,
                becomes a tensor with the value of each rank.
            loader: The loader that the samples come from. None takes the one that has delivered the last batch.
            use_gather_object: Whether `data` is a list with any object for each sample, such as tensors of different
                shapes. The objects are pickled.

        Returns:
            The collection with the rows of all ranks. Its tensors carry no gradient history.

        Raises:
            UsageError: Some samples are repeated, but `data` does not have one row for each sample of a batch or of all
                batches. Or two loops over loaders run in step, and `loader` does not say which one counts.
            RankDisagreementError: The ranks bring different collections.
        """
        from nucleate.wrappers.metric_gather import gather_for_metrics

        self.launch()
        return gather_for_metrics(data, self._communicator, self._strategy, self._deliveries, loader, use_gather_object)

    def all_reduce(self, data: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the combination of every rank's tensors; see `Communicator.all_reduce`."""
        self.launch()
        return self._communicator.all_reduce(data, reduce_op, group)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Run the block on rank 0 before the other ranks, for example to prepare a file that all ranks then read.

        Args:
            local: Whether the first process of each node goes first, where nodes have file systems of their own.
        """
        self.launch()
        goes_first = self.local_rank == 0 if local else self.is_global_zero
        if not goes_first:
            self._communicator.barrier()
        try:
            yield
        finally:
            # This also happens if rank 0 raised an error. The other ranks continue and do not wait forever.
            if goes_first:
                self._communicator.barrier()

    # -- logs ----------------------------------------------------------------------------------------------

    @property
    def loggers(self) -> list[Any]:
        """The loggers that the runtime was given."""
        return [] if self._loggers is None else list(self._loggers.loggers)

    @property
    def logger(self) -> Any:
        """The first logger.

        Raises:
            UsageError: The runtime was not given a logger.
        """
        if not self.loggers:
            raise UsageError("this runtime has no logger. Give it one, as in Runtime(loggers='csv').")
        return self.loggers[0]

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Write a metric by each logger, on rank 0. See `log_dict`."""
        self.log_dict({name: value}, step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write metrics by each logger, on rank 0. The values are rank 0's; `all_reduce` averages over the ranks.

        Args:
            metrics: Numbers by name. Tensors of one element become numbers. Other values are passed to the loggers.
            step: The number of the step. None takes the step after the last one that was logged.

        Raises:
            UsageError: A tensor has several elements, or `step` is not an integer.
        """
        if self._loggers is not None:
            self._loggers.log(metrics, step)

    # -- checkpoints ---------------------------------------------------------------------------------------

    @repeatable
    def save(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | nn.Module,
        filter: Mapping[str, Callable[[str, Any], bool]] | Callable[[str, Any], bool] | None = None,
        *,
        format: str | None = None,
        max_shard_size: int | str = "5GB",
        asynchronous: bool = False,
        keep_last: int | str | None = None,
        keys: KeyMap | None = None,
    ) -> SaveHandle | None:
        """Write a training state, or one model, to a folder or a file. Every rank calls this method.

        The checkpoint is whole or absent, at whatever moment a process is killed. See `nucleate.checkpoint.save`.

        Args:
            path: The endings `.safetensors`, `.pt`, `.pth`, `.bin` and `.ckpt` stand for one file, any other name for a
                folder.
            state: Modules, optimizers, objects with a `state_dict`, tensors and plain values by name; or one module.
            format: The format of a folder: `"dcp"` (the default), `"safetensors"`, which Hugging Face's libraries read,
                or the name of an installed writer.
            filter: For a name in `state`, a function of key and value that returns whether to save them.
            max_shard_size: The largest size of the files of a safetensors folder.
            asynchronous: Return as soon as the state is copied to CPU memory, and write in the background.
            keep_last: How many checkpoints stay in the same folder. The file `latest` leads to the newest.
            keys: Other names in the checkpoint, and rules, if the state is one module; see `load_raw`.

        Returns:
            A handle to wait for with `asynchronous`, else None.
        """
        from nucleate.checkpoint import save

        self.launch()
        for live in self._live_in(state):
            live.refuse_emptied("save")
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
                writers=self._plugins.writers,
                one_file=self._strategy.saves_one_file,
            )

    def load(
        self,
        path: str | PathLike[str],
        state: dict[str, Any] | nn.Module | None = None,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        remainder: bool | None = None,
        reader: str | None = None,
    ) -> LoadReport:
        """Read a checkpoint into `state`, in place. See `nucleate.checkpoint.load`.

        Args:
            path: The path that was given to `save`.
            state: The state to load into, as it was given to `save`, or a part of that state.
            strict: Refuse keys that are missing, unexpected or of another shape or dtype, in the entries of `state`.
            weights_only: None and True read files as data, and never run code that a file names. False also restores
                the other objects of a torch file, such as an `argparse.Namespace`, as `torch.load` does. This runs code
                that the file chooses, so pass it only for files that you trust.
            remainder: Also return everything that `state` does not contain, whole on every rank. None means True only
                without a `state`, so that a rank that loads a model does not also hold a whole optimizer state.
            reader: The format's name, if the files do not show it.

        Returns:
            The report: the loaded keys, the missing keys and so on. As a dict, it holds the remainder.
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
                readers=self._plugins.readers,
                trusted=weights_only is False,
                prepare=self._prepare_to_load,
            )

    def load_raw(
        self,
        path: str | PathLike[str],
        obj: nn.Module | Optimizer,
        strict: bool = True,
        *,
        weights_only: bool | None = None,
        prefix: str = "",
        keys: KeyMap | None = None,
        reader: str | None = None,
        mmap: bool = False,
    ) -> LoadReport:
        """Load a model's weights, or an optimizer's state, from any format. See `nucleate.checkpoint.load_raw`.

        A deferred model is bound to the files, and `setup` reads only this rank's shard of each tensor. Any other model
        is filled in place.

        Args:
            path: A safetensors or torch file, a Hugging Face folder, a folder of torch.distributed.checkpoint, or a
                checkpoint that `save` wrote.
            obj: The model, deferred, real or set up. Or an optimizer, for a file that holds its `state_dict()`.
            strict: Refuse keys that are missing, unexpected or of another shape or dtype. Otherwise deferred tensors
                that are missing are made by their recipes.
            weights_only: See `load`.
            prefix: Load only the keys that begin with this text, and remove it from the keys.
            keys: Other names for keys: a dict of regular expressions and replacements, a function, a rule that renames,
                joins, splits or transposes tensors (`nucleate.checkpoint.rename`, ...), or a list of these.
            reader: The format's name, if the files do not show it.
            mmap: Map deferred tensors on the CPU to the file's own pages, if possible.

        Returns:
            The report: the loaded, missing, unexpected, mismatched, cast and tied keys.
        """
        from nucleate.checkpoint import load_raw

        self.launch()
        with metered(self.is_global_zero):
            return load_raw(
                path,
                obj,
                self._communicator,
                strict,
                prefix=prefix,
                keys=keys,
                reader=reader,
                readers=self._plugins.readers,
                mmap=mmap,
                trusted=weights_only is False,
                prepare=self._prepare_to_load,
            )

    # -- layout --------------------------------------------------------------------------------------------

    def layout(self, model: nn.Module) -> Layout:
        """Return the layout of a model that was set up: the dtype, shape and placements of each tensor.

        `print(runtime.layout(model))` shows it as a table.

        Args:
            model: The model that `setup` returned, or the user's model itself.

        Raises:
            UsageError: The model was not set up by this runtime, or parameters came into it since then.
        """
        for live in self._live_in(model):
            return live.layout
        raise UsageError(f"this {type(model).__name__} has no layout: it was not set up. Call `setup` first.")

    # -- inside --------------------------------------------------------------------------------------------

    def _set_up(self, module: nn.Module, method: str) -> ModuleWrapper:
        """Return the wrapper of a model that was set up, or refuse the argument of a method."""
        model = inside(module, ModuleWrapper) if isinstance(module, nn.Module) else module
        if not isinstance(model, ModuleWrapper):
            raise UsageError(
                f"{method} takes the model that `setup` returned, not {type(model).__name__}. Set it up first."
            )
        return model

    def _start_ranks(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Start the ranks; see `launch`."""
        from nucleate.process_start import start_function, start_script

        if function is not _NOTHING:
            result = start_function(self, function, args, kwargs)
            self._has_supervised = True
            return result
        if self._has_supervised:
            raise UsageError(
                "the processes of this runtime have ended. If `launch` got a function, do everything that needs the "
                "processes inside of that function."
            )
        self._has_supervised = True
        return start_script(self)

    def _renew(self) -> None:
        """Make this runtime, which another process has made, one of this process."""
        Runtime.__init__(self, **self._settings)

    def __getstate__(self) -> dict[str, Any]:
        # Only the arguments, and the attributes of a subclass. `_renew` makes the others.
        return {name: value for name, value in vars(self).items() if name not in self._renewed}

    def _live_in(self, state: Any) -> Iterator[LiveLayout]:
        """Yield the layouts of the models in a state."""
        if isinstance(state, dict):
            for value in state.values():
                yield from self._live_in(value)
        elif isinstance(state, nn.Module):
            model = inside(state.module if isinstance(state, ModuleWrapper) else state)
            if model in self._models:
                yield LiveLayout.of(model)

    def _prepare_to_load(self, model: nn.Module, stored: Mapping[str, ElementSource]) -> None:
        """Let the precision change a model that is not set up to the form of its stored tensors."""
        if isinstance(inside(model, ModuleWrapper), ModuleWrapper) or inside(model) in self._models:
            return
        with without_shells(model) as plain:
            if not is_recording():
                # Tensors that were built on the meta device by hand are bound to files like deferred tensors.
                replace_inference_tensors(plain)
                adopt_vacancies(plain, self._device)
            with resumed(plain):
                self._precision.before_load(plain, stored)

    def _check_optimizer(self, optimizer: Optimizer) -> list[Tensor]:
        """Refuse an optimizer that cannot be wrapped, and return its parameters that no model has."""
        if isinstance(optimizer, OptimizerWrapper):
            raise UsageError("this optimizer has been set up already; use the optimizer that was returned then.")
        if not isinstance(optimizer, Optimizer):
            raise UsageError(f"setup_optimizers takes torch.optim.Optimizers; got {type(optimizer).__name__}.")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        found = self._free.find(optimizer, parameters, known_ids(self._models))
        self._strategy.check_optimizer(optimizer)
        return found

    def _free_among(self, optimizer: Optimizer, parameters: Iterable[Any]) -> list[Tensor]:
        """Return the parameters that no model has, on which all ranks agree; see `FreeParameters.find`."""
        with self._communicator.all_or_none("adding parameters to an optimizer"):
            found = self._free.find(optimizer, parameters, known_ids(self._models))
        self._free.agree([found])
        return found

    def _wrap_optimizer(self, optimizer: Optimizer) -> OptimizerWrapper:
        links = RuntimeLinks(self._free_among, self._accumulation, self._free, self._callbacks, self._termination)
        return OptimizerWrapper(optimizer, self._precision, self._strategy, links)

    def _wrap_loader(self, loader: DataLoader[Any], use_sampler: bool, move_to_device: bool) -> DataLoaderWrapper:
        return prepare(
            loader,
            num_replicas=self._strategy.data_parallel_size,
            rank=self._strategy.data_parallel_rank,
            device=self._device if move_to_device else None,
            seed=self._communicator.broadcast(torch.initial_seed()),
            seed_workers=last_seed() is None or seeds_workers(),
            use_distributed_sampler=use_sampler,
            deliveries=self._deliveries,
        )
