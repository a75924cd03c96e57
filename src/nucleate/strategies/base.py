"""The base class of strategies: the layout of a model over ranks, and its effect on backward, clipping and saving."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate.cluster.communicator import Communicator
from nucleate.cluster.environment import Environment
from nucleate.dimensions.sharding.gathering import abandon_backward, gatherings_in, shards_shown
from nucleate.materialize import Plan
from nucleate.plugin import Plugin
from nucleate.strategies.clip import clip_by_norm, clip_by_value
from nucleate.strategies.finish import finish


class Strategy(Plugin):
    """A plugin that decides how a model is laid out over the ranks.

    Required: the contract's two methods, `module_init_context()` and `setup(model)`. `setup` receives the model,
    deferred or real, after accelerator and precision have been applied. It returns the module whose forward the user
    calls, with all tensors materialized.

    A strategy that lays tensors out by torch's own means leaves `setup` as it is and implements `lay_out`. The core
    does the rest: it plans, keeps ties, attributes and hooks, materializes this rank's part of each tensor, and
    compares replicas. A strategy whose library has an engine of its own writes its own `setup`
    (`nucleate.materialize`).

    Everything else has a working default.

    Attributes:
        device: This process's device, set by `connect`.
        environment: The rank of this process and the world size, set by `connect`.
        timeout: The time that a collective waits for the other ranks before it fails.
        process_group_backend: The torch.distributed backend of the ranks; None takes the accelerator's.
        saves_one_file: Whether `Runtime.save` without a format refuses a path that stands for a folder.
        start_method: The way in which `Runtime(devices=N)` starts processes; see `docs/how-to/several-processes.md`.
            None chooses one.
    """

    kind: ClassVar[str] = "strategy"
    #: Whether the strategy spans several processes, and so needs a process group.
    distributed: ClassVar[bool] = False
    #: Whether a model of `init_module()` without `empty_init` stays deferred until `setup`: True if no rank should hold
    #: the whole model.
    shards: bool = False

    device: torch.device = torch.device("cpu")
    environment: Environment = Environment()
    timeout: timedelta = timedelta(minutes=10)
    process_group_backend: str | None = None
    saves_one_file: bool = False
    start_method: str | None = None

    def connect(self, device: torch.device, environment: Environment) -> None:
        """Store the device and the rank of this process. The process group has started before this call."""
        self.device = device
        self.environment = environment

    @abstractmethod
    def module_init_context(self) -> AbstractContextManager[object]:
        """Return the context in which a model is constructed for this strategy."""

    def setup(self, model: nn.Module) -> nn.Module:
        """Lay the model out by `lay_out`, materialize its deferred tensors, and return the module to call.

        Raises:
            ConfigurationError: `check_model` refuses the model. Nothing has been changed.
            RankDisagreementError: Replicas made from the same recipes differ.
            UninitializedError: See `nucleate.materialize.Plan.of`.
        """
        return self.finish(model, Plan.of(model))

    @final
    def finish(self, model: nn.Module, plan: Plan) -> nn.Module:
        """Set a model up with a plan that was made before.

        Args:
            model: The model.
            plan: The plan of the model as it is now.
        """
        return finish(self, model, plan)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that `lay_out` cannot lay out, before anything is changed. By default, do nothing.

        Args:
            model: The model. Its deferred tensors appear as meta tensors.

        Raises:
            ConfigurationError: The strategy cannot lay this model out; the message gives the FQNs.
        """

    def lay_out(self, model: nn.Module) -> None:
        """Replace parameters by their parts, such as DTensors, in place. By default, do nothing: every rank keeps all.

        Deferred tensors are on the meta device here, and have no values. This method must not make values, and must not
        exchange any. Real tensors are equal on all ranks.

        Args:
            model: The model.
        """

    def enclose(self, model: nn.Module) -> nn.Module:
        """Return the module whose forward the user calls: by default the model itself.

        Args:
            model: The model, laid out, with the values of all its tensors.
        """
        return model

    @property
    def storage_device(self) -> torch.device:
        """The device that keeps the tensors that `lay_out` has sharded."""
        return self.device

    @property
    def communicator(self) -> Communicator:
        """The communicator of this process."""
        return Communicator(self.environment, self.device)

    @property
    def data_parallel_size(self) -> int:
        """The number of ranks that split the data."""
        return self.environment.world_size if self.distributed else 1

    @property
    def data_parallel_rank(self) -> int:
        """The number of this rank's part of the data."""
        return self.environment.global_rank if self.distributed else 0

    @property
    def axes(self) -> tuple[str, ...]:
        """The names that `group_of` knows: by default none."""
        return ()

    def group_of(self, axis: str) -> Any:
        """Return the process group of this rank along an axis of the strategy's mesh. Every rank must call it.

        Args:
            axis: One of `axes`.
        """
        raise NotImplementedError(f"the strategy {self.name!r} has no axes.")

    def forward_backward(
        self, model: Any, inputs: Any, loss_of: Callable[[Any], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Run forward, the loss and backward of one batch. A strategy with a schedule of its own replaces it.

        Args:
            model: The model that `Runtime.setup` returned.
            inputs: The inputs of forward: a tensor, a tuple of arguments, or a dict of keyword arguments.
            loss_of: Computes the loss from the model's output.
            backward: Computes the gradients of a loss.

        Returns:
            The loss, without a graph.
        """
        with self.step_context():
            if isinstance(inputs, Mapping):
                output = model(**inputs)
            else:
                output = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
            loss = loss_of(output)
            backward(loss)
        return loss.detach()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients of `loss`.

        Args:
            loss: The loss.
            args: Positional arguments of `torch.Tensor.backward`.
            kwargs: Keyword arguments of `torch.Tensor.backward`.

        Raises:
            ConfigurationError: A unit of `fully_shard` cannot exchange a gradient, because it is sparse or has another
                dtype.
        """
        try:
            loss.backward(*args, **kwargs)
        except Exception as error:
            explained = abandon_backward(error)
            if explained is not None:
                raise explained from error
            raise

    def step_context(self) -> AbstractContextManager[object]:
        """Return the context that surrounds each forward and each backward."""
        return nullcontext()

    def exchanges(self, call: str, module: nn.Module | None = None) -> bool:
        """Return whether every rank must make a call, because this strategy exchanges tensors in it.

        A rank that waits in such a call for a rank that will not come is noticed within seconds. By default, a
        strategy that shards exchanges in every call.

        Args:
            call: `"forward"`, `"backward"` or `"clip_gradients"`.
            module: The module that `setup` returned, for `"forward"`.
        """
        return self.shards

    def evaluation_context(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return the context that surrounds a forward without gradients of a model in evaluation mode.

        Args:
            module: The module that `setup` returned.
        """
        return nullcontext()

    def no_backward_sync(self, module: nn.Module) -> AbstractContextManager[object]:
        """Return a context in which backward accumulates gradients without exchanging them.

        Args:
            module: The module that `setup` returned.
        """
        return nullcontext()

    def mark_forward_method(self, module: nn.Module, name: str) -> None:
        """Make the method `name` go through this strategy as forward does.

        By default a unit of `fully_shard` gathers its parameters around the method too.

        Args:
            module: The module that `setup` returned.
            name: The name of a method of the user's model.
        """
        for gathering in gatherings_in(module) if self.shards else ():
            if gathering.root is module:
                gathering.mark(name)

    def guards_methods(self, module: nn.Module) -> bool:
        """Return whether a method that calls forward itself would bypass this strategy."""
        return False

    def renew(self, model: nn.Module, module: nn.Module) -> nn.Module:
        """Return the module to call after other parameters of the model came to require gradients than before.

        Args:
            model: The user's model.
            module: The module that was called until now.
        """
        return module

    def regain_shards(self, module: nn.Module) -> None:
        """Put parameters that a forward has gathered back into the form that they have between two steps.

        Every rank calls this method after each forward without gradients. By default the units of `fully_shard` free
        their parameters.

        Args:
            module: The module that `setup` returned.
        """
        for gathering in gatherings_in(module) if self.shards else ():
            gathering.regain()

    def shards_shown(self, module: nn.Module) -> AbstractContextManager[object] | None:
        """Return a context in which `module.parameters()` has the tensors that optimizers and checkpoints know.

        A single rank may enter the context at any time, also between a forward and its backward. So the context must
        not communicate, and must not change the later communication.

        Args:
            module: The module that `setup` returned.

        Returns:
            The context, or None if the parameters have that form already. The default knows the units of
            `fully_shard`.
        """
        return shards_shown(module) if self.shards else None

    def abandon(self, module: nn.Module) -> None:
        """Forget a forward that has failed, so that the next one can run. The default resets units of `fully_shard`.

        Args:
            module: The module that `setup` returned.
        """
        for gathering in gatherings_in(module) if self.shards else ():
            gathering.abandon()

    def explain(self, error: Exception, module: nn.Module, method: str) -> Exception | None:
        """Return a better error for one that a method of the model has raised because of this strategy.

        Args:
            error: The error.
            module: The module that `setup` returned.
            method: The name of the method that was called; it may be `forward`.

        Returns:
            An error that says what to do, or None, the default, for an error of another kind.
        """
        return None

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse an optimizer of a kind that this strategy cannot step, before `setup` changes anything.

        By default, do nothing.

        Args:
            optimizer: The user's optimizer. Its parameters may still be deferred, and may not be laid out yet.

        Raises:
            ConfigurationError: The strategy cannot step this optimizer; the message says which one it can step.
        """

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        """Prepare an optimizer before its first step, and again when parameters are added. By default, do nothing.

        Args:
            optimizer: The user's optimizer, on the parameters that `setup` has left.

        Raises:
            ConfigurationError: The optimizer cannot step these parameters; the message says which one can.
        """

    def optimizer_step_context(self, optimizer: Optimizer) -> AbstractContextManager[object]:
        """Return the context that surrounds each step of an optimizer.

        Args:
            optimizer: The user's optimizer.
        """
        return nullcontext()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer to save, in the form of torch's `state_dict`."""
        return optimizer.state_dict()

    def clip_gradients(
        self,
        parameters: Sequence[Tensor],
        *,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        clip_val: float | None = None,
        error_if_nonfinite: bool = True,
    ) -> Tensor | None:
        """Clip the gradients of some parameters, by their norm over all ranks or by value.

        Args:
            parameters: The parameters.
            max_norm: The largest allowed norm; None clips by value.
            norm_type: The order of the norm.
            clip_val: The largest allowed absolute value of an element.
            error_if_nonfinite: Refuse a norm that is NaN or infinite, before any gradient is changed.

        Returns:
            The norm before clipping, equal on every rank, or None when clipping by value.

        Raises:
            ConfigurationError: The limit is negative or NaN.
            NonFiniteGradientError: See `error_if_nonfinite`.
        """
        if max_norm is not None:
            return clip_by_norm(parameters, max_norm, norm_type, error_if_nonfinite)
        assert clip_val is not None
        clip_by_value(parameters, clip_val)
        return None
