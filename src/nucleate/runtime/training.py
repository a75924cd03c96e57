"""The training of models by a runtime: optimizers, data loaders, and the steps of a training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from nucleate.errors import ConfigurationError, DeferredUseError, UsageError
from nucleate.layout import LiveLayout
from nucleate.runtime.parts import Parts
from nucleate.seed import last_seed, seeds_workers
from nucleate.shells import inside
from nucleate.strategies.clip import refuse_limits
from nucleate.wrappers.dataloader import DataLoaderWrapper, prepare
from nucleate.wrappers.known_models import layouts_in, wrapper_of
from nucleate.wrappers.optimizer import OptimizerWrapper
from nucleate.wrappers.passes import EpochMeeting
from nucleate.wrappers.scaled_backward import backward_allowed
from nucleate.wrappers.stream import split_stream


class Training(Parts):
    """The methods of a `Runtime` for a training loop."""

    # The number of open blocks in which gradients are not exchanged.
    _num_unsynchronized: int = 0

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
        with self._communicator.meeting("setup_optimizers"):
            wrapped = self._optimizer_setup.run(optimizers)
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def setup_dataloaders(
        self,
        *loaders: DataLoader[Any],
        use_distributed_sampler: bool = True,
        move_to_device: bool = True,
        split_iterable: bool | None = None,
    ) -> Any:
        """Split data loaders over the ranks and move their batches to the device.

        The order of an epoch is what a plain `DataLoader` of one process would draw when the epoch begins: from the
        loader's `generator`, else from rank 0's global generator. Rank `r` of `W` takes every `W`-th sample.

        Args:
            loaders: The loaders. Each rank iterates over its own part.
            use_distributed_sampler: Whether to replace samplers. With False, split the data yourself.
            move_to_device: Whether to move every tensor of a batch.
            split_iterable: Whether to deal out the samples of an `IterableDataset`, so that each rank gets every `W`-th
                one. None leaves such a dataset as it is and warns, because each rank may get all samples. False leaves
                it without a warning.

        Returns:
            The wrapped loader, or a tuple of them if there are several.

        Raises:
            UsageError: There is no loader, one is not a `DataLoader`, or one is set up already.
            ConfigurationError: `split_iterable` is not a bool or None.
        """
        self.launch()
        if not loaders:
            raise UsageError("setup_dataloaders() was called without a data loader.")
        with self._communicator.meeting("setup_dataloaders"):
            wrapped = tuple(
                self._wrap_loader(loader, use_distributed_sampler, move_to_device, split_iterable) for loader in loaders
            )
        return wrapped[0] if len(wrapped) == 1 else wrapped

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
        if model is not None and not any(True for _ in layouts_in(model, self._models)):
            raise UsageError(f"backward(model=...) takes a model that was set up, not this {type(model).__name__}.")
        for known in self._models:
            LiveLayout.of(known).check_once()
        with self._exchange("backward"), backward_allowed(), self._strategy.step_context():
            self._strategy.backward(self._precision.scale(self._accumulation.divided(tensor)), *args, **kwargs)

    def forward_backward(self, model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor]) -> Tensor:
        """Run forward, the loss and backward of one batch, under any strategy.

        Args:
            model: The model that `setup` returned.
            batch: The pair of the inputs and the targets. The inputs are a tensor, a tuple of arguments of forward or a
                dict of its keyword arguments.
            loss_fn: Called as `loss_fn(output, targets)`; returns the loss, one number.

        Returns:
            The loss, without a graph.

        Raises:
            UsageError: `batch` is not a pair.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise UsageError(
                f"forward_backward() takes a batch that is the pair (inputs, targets), not {type(batch).__name__}."
            )
        inputs, targets = batch
        return self._strategy.forward_backward(
            model, inputs, lambda output: loss_fn(output, targets), lambda loss: self.backward(loss)
        )

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
        for live in layouts_in(module, self._models):
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
        with self._exchange("clip_gradients"):
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
        model = wrapper_of(module, "no_backward_sync")
        with ExitStack() as stack:
            if enabled:
                stack.enter_context(self._strategy.no_backward_sync(model.forward_module))
                self._num_unsynchronized += 1
                stack.callback(lambda: setattr(self, "_num_unsynchronized", self._num_unsynchronized - 1))
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
        originals = [inside(wrapper_of(model, "accumulate").module) for model in models]
        if not models:
            raise UsageError("accumulate() was called without a model.")
        with ExitStack() as stack:
            is_last = stack.enter_context(self._accumulation.micro_batch(originals, every, last))
            for model in models:
                stack.enter_context(self.no_backward_sync(model, enabled=not is_last))
            yield is_last

    def _exchange(self, name: str) -> AbstractContextManager[object]:
        """Return the context of a call that every rank must make, if the strategy exchanges tensors in it."""
        if not self._strategy.exchanges(name):
            return nullcontext()
        # Without synchronization, ranks may make different numbers of calls.
        return self._communicator.exchange(name, counts=not self._num_unsynchronized)

    def _wrap_loader(
        self, loader: DataLoader[Any], use_sampler: bool, move_to_device: bool, split: bool | None
    ) -> DataLoaderWrapper:
        num_replicas, rank = self._strategy.data_parallel_size, self._strategy.data_parallel_rank
        meeting = EpochMeeting(self._communicator, has_copies=num_replicas < self.world_size)
        return prepare(
            split_stream(loader, num_replicas, rank, split, warns=use_sampler and self.is_global_zero),
            num_replicas=num_replicas,
            rank=rank,
            device=self._device if move_to_device else None,
            meeting=meeting if self.world_size > 1 else None,
            seed_workers=last_seed() is None or seeds_workers(),
            use_distributed_sampler=use_sampler,
            deliveries=self._deliveries,
        )
