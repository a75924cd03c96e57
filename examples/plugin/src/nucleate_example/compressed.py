"""Replicas that exchange gradients in a smaller dtype.

`ddp` overlaps the exchange with backward; this one sends everything in one message after it, in half the bytes.
That is worth it where the network is slow and the model small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import final
from weakref import WeakSet

import torch
from torch import Tensor, nn

from nucleate import Strategy
from nucleate.errors import ConfigurationError
from nucleate.materialize import materialize


@final
class CompressedStrategy(Strategy):
    """Every process holds the whole model and sends its gradients in `dtype`.

    Args:
        dtype: What gradients are sent in: `torch.bfloat16`, `torch.float16`, or `torch.float32` to compare with.

    Raises:
        ConfigurationError: `dtype` is another one.
    """

    name = "compressed"
    distributed = True

    def __init__(self, *, dtype: torch.dtype = torch.bfloat16) -> None:
        allowed = (torch.bfloat16, torch.float16, torch.float32)
        if dtype not in allowed:
            raise ConfigurationError(f"dtype is {dtype}; gradients are sent in {', '.join(map(str, allowed))}.")
        self.dtype = dtype
        self._models: WeakSet[nn.Module] = WeakSet()
        self._exchanges = True

    def module_init_context(self) -> AbstractContextManager[object]:
        """Construct as usual."""
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        """Make what is deferred, on this process's device, and let every replica start as rank 0's."""
        materialize(model, self.device)
        if self.environment.world_size > 1:
            # Recipes made equal replicas already; tensors that were real before may differ from rank to rank.
            for tensor in (*model.parameters(), *model.buffers()):
                torch.distributed.broadcast(tensor.detach(), src=0)
        self._models.add(model)
        return model

    def backward(self, loss: Tensor) -> None:
        """Compute gradients and average them over the processes."""
        super().backward(loss)
        if self._exchanges and self.environment.world_size > 1:
            for model in self._models:
                self._average_gradients(model)

    @contextmanager
    def no_backward_sync(self, module: nn.Module) -> Iterator[None]:
        """Keep gradients to this process. The next exchange averages their sum."""
        self._exchanges = False
        try:
            yield
        finally:
            self._exchanges = True

    def _average_gradients(self, model: nn.Module) -> None:
        # A parameter without a gradient takes part with zeros: another rank may have one for it.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        if not gradients:
            return
        # Divided before it is sent, because a sum could leave the range of float16.
        message = torch.cat([gradient.flatten().to(self.dtype) for gradient in gradients])
        message /= self.environment.world_size
        torch.distributed.all_reduce(message)
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, part in zip(gradients, message.split(sizes), strict=True):
            gradient.copy_(part.view_as(gradient))
