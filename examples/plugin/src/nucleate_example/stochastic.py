"""bfloat16 parameters that learn from small updates.

A bfloat16 number has 8 significant bits, so an update of less than 1/512 of a parameter is rounded away, every time.
Here a step is computed in float32 and rounded up or down at random, with the probability that makes it right on
average (Gupta et al., "Deep Learning with Limited Numerical Precision", 2015).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nucleate import Precision
from nucleate.errors import ConfigurationError
from nucleate.plugin import Composition
from nucleate.precision import HalfPrecision


@final
class StochasticPrecision(Precision):
    """Keep parameters in bfloat16, step in float32, and round stochastically.

    During a step there is a float32 copy of the parameters and gradients; the optimizer's state stays in float32.

    Args:
        seed: Of the random numbers that rounding uses; torch's own stream is not touched. Every rank uses the same
            ones, so replicas stay equal.
    """

    name = "bf16-stochastic"

    def __init__(self, *, seed: int = 0) -> None:
        # A plugin does not extend another plugin; it may well use one.
        self._half = HalfPrecision(torch.bfloat16)
        self._seed = seed
        self._num_steps = 0

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16."""
        return self._half.dtype

    def check(self, composition: Composition) -> None:
        """Refuse strategies that shard: their parameters cannot change dtype during a step.

        Raises:
            ConfigurationError: The strategy shards parameters.
        """
        self._half.check(composition)
        if getattr(composition.strategy, "shards", False):
            raise ConfigurationError(
                f"precision {self.name!r} does not work with strategy {composition.strategy.name!r}, which shards "
                "parameters. Use a strategy that replicates them, such as 'ddp', or precision 'bf16-true'."
            )

    def module_init_context(self) -> AbstractContextManager[object]:
        """Construct in bfloat16."""
        return self._half.module_init_context()

    def setup(self, model: nn.Module) -> nn.Module:
        """Cast parameters, keep buffers."""
        return self._half.setup(model)

    def forward_context(self) -> AbstractContextManager[object]:
        """Surround forward as `bf16-true` does."""
        return self._half.forward_context()

    def convert_input(self, data: Any) -> Any:
        """Cast floating point tensors to bfloat16."""
        return self._half.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """Cast floating point tensors back to the default dtype."""
        return self._half.convert_output(data)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        """Step in float32, then round.

        Raises:
            ConfigurationError: There is a closure, which would run forward on float32 parameters.
        """
        if closure is not None:
            raise ConfigurationError(f"precision {self.name!r} cannot step with a closure, as LBFGS does.")
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # torch wants a gradient to have its parameter's dtype at every moment.
            parameter.grad = None
            parameter.data = parameter.data.float()
            parameter.grad = gradient.float()
        try:
            return optimizer.step()
        finally:
            self._num_steps += 1
            for number, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                generator = torch.Generator(parameter.device)
                generator.manual_seed(hash((self._seed, self._num_steps, number)) % 2**63)
                parameter.grad = None
                parameter.data = round_stochastically(parameter.data, generator)
                parameter.grad = gradient

    def state_dict(self) -> dict[str, Any]:
        """Return how many steps have been rounded, which decides the random numbers of the next."""
        return {"num_steps": self._num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after that many steps."""
        self._num_steps = state["num_steps"]


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down at random, so that the expected value is the value.

    Args:
        values: float32 of any shape.
        generator: Where the random numbers come from.
    """
    # bfloat16 is the upper half of a float32: adding 16 random bits carries into it as often as the lower half is near.
    noise = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    rounded = ((values.contiguous().view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    # Infinity and NaN have no neighbours to round to.
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
