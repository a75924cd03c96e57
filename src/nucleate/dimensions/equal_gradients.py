"""The check that ranks which hold a parameter whole have computed the same gradient of it.

A layer without a style of tensor parallel sees whole activations, so that every rank of the group computes the same
gradient. If a layer before it has split them, each rank computes the gradient of its part alone, and the ranks would
train different models without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from nucleate.errors import RankDisagreementError, name_list
from nucleate.layout import held_values, is_partial
from nucleate.shells import named_parameters

#: The largest relative difference of two norms that rounding explains.
_TOLERANCE = 1e-2


class EqualGradients:
    """The check of each model at its first optimizer step.

    Args:
        is_split: Returns whether a parameter has a style.
    """

    def __init__(self, is_split: Callable[[Any], bool]) -> None:
        self._is_split = is_split
        self._unchecked: WeakSet[nn.Module] = WeakSet()

    def __reduce__(self) -> tuple[type[EqualGradients], tuple[Any]]:
        # A strategy goes to another process without the models of this one.
        return EqualGradients, (self._is_split,)

    def add(self, model: nn.Module) -> None:
        """Check a model at the next step."""
        self._unchecked.add(model)

    def check(self, group: Any) -> None:
        """Compare the norms of the gradients of all parameters without a style over the ranks of a group.

        Args:
            group: The process group.

        Raises:
            RankDisagreementError: They differ; the message gives the FQNs. Every rank of the group raises it.
        """
        import torch.distributed as dist

        for model in list(self._unchecked):
            whole = {name: p for name, p in named_parameters(model) if not self._is_split(p) and p.requires_grad}
            if not any(p.grad is not None for p in model.parameters()):
                continue
            self._unchecked.discard(model)
            if not whole:
                continue
            norms = torch.stack([_norm(parameter) for parameter in whole.values()])
            gathered = [torch.empty_like(norms) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, norms, group=group)
            together = torch.stack(gathered)
            low, high = together.amin(0), together.amax(0)
            differs = (high - low > _TOLERANCE * high.abs()).tolist()
            names = [name for name, wrong in zip(whole, differs, strict=True) if wrong]
            if names:
                raise RankDisagreementError(
                    f"the ranks of a tensor parallel group have different gradients of {name_list(names)}, which the "
                    "plan leaves whole. A layer before has split their inputs. Give these modules the style "
                    "'replicated', which adds the gradients up, or another style in the plan."
                )


def _norm(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None or is_partial(gradient):
        return torch.zeros((), dtype=torch.float32, device=held_values(parameter).device)
    norm: Tensor = torch.linalg.vector_norm(held_values(gradient).detach(), dtype=torch.float32)
    return norm
