"""The building of models by a runtime: it starts the processes, constructs models and sets them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar, overload

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nucleate.deferred import deferred, eager, outside_inference_mode
from nucleate.devices import made_current
from nucleate.errors import ConfigurationError, UsageError
from nucleate.materialize.block import Block
from nucleate.model_setup import ModelSetup, agree_on_generators
from nucleate.report.meter import metered
from nucleate.runtime.parts import Parts
from nucleate.shells import inside
from nucleate.wrappers.module import ModuleWrapper
from nucleate.wrappers.optimizer import OptimizerWrapper

T = TypeVar("T")

#: The mark of an argument that was not given.
_NOTHING: Any = object()


class Building(Parts):
    """The methods of a `Runtime` from the start of the processes to a model that is set up."""

    # Whether this process has started ranks.
    _has_supervised = False

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
            elif self._environment.run_id:
                from nucleate.cluster import launcher

                launcher.bind(self._environment.run_id)
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
        with self._communicator.meeting("init_module"):
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
        name = type(inside(module)).__name__ if isinstance(module, nn.Module) else ""  # FSDP changes the class.
        setup = ModelSetup(self._parts, self._communicator, self._integrations, self._verify, self._free)
        with self._communicator.meeting("setup"):
            wrapped = setup.run(module, optimizers, self._models, move_to_device, _reapply_compile)
        self._models.add(inside(wrapped.module))
        if self._strategy.data_parallel_size > 1:
            self._watch_inputs(wrapped, name)
        self.call("on_after_setup", runtime=self, fabric=self, module=wrapped)
        last = () if scheduler is None else (scheduler,)
        return (wrapped, *map(self._optimizer_setup.wrapped, optimizers), *last) if optimizers else wrapped

    def setup_module(
        self, module: nn.Module, move_to_device: bool = True, _reapply_compile: bool = True
    ) -> ModuleWrapper:
        """Set up a model without optimizers; see `setup`."""
        return self.setup(module, move_to_device=move_to_device, _reapply_compile=_reapply_compile)

    def _watch_inputs(self, model: ModuleWrapper, name: str) -> None:
        """Let the first training forwards of a model notice data that nobody has split over the ranks."""
        from nucleate.cluster.tally import Tally
        from nucleate.wrappers.equal_inputs import EqualInputs

        tally = Tally(self._environment)
        model.watch_inputs(EqualInputs(name, tally, self._strategy.data_parallel_size, self._deliveries))

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
