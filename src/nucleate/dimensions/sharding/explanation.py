"""Explanations of errors that torch raises for sharded parameters in words of its own, without a name or a cure.

Some uses of a sharded model cannot be seen before torch refuses them. torch's error then becomes the cause of an error
that names the module or parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import nn

from nucleate.errors import ConfigurationError, UsageError, name_list

# Parts of torch's messages (torch/distributed/tensor/_dispatch.py and _sharding_prop.py, 2.13).
_MIXED = "got mixed torch.Tensor and DTensor"
_NO_RULE = "does not have a sharding strategy registered"
# The reduction of gradients (`foreach_reduce` in torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py, 2.13).
_SPARSE = "fsdp::chunk_cat"
_OTHER_DTYPES = "FSDP reduce-scatter expects uniform gradient dtype"


def explain_forward(error: Exception, model: nn.Module, method: str) -> Exception | None:
    """Return an error that says where a method of the model has used sharded parameters, or None for another error.

    Args:
        error: The error that the method raised.
        model: The sharded model.
        method: The name of the method; it may be `forward`.
    """
    text = str(error)
    if _MIXED not in text and _NO_RULE not in text:
        return None
    where = _innermost(error.__traceback__, {id(module): fqn for fqn, module in model.named_modules()})
    parameters = f"the parameters of {where}" if where else "parameters of the model"
    ways = [f"If {method} changes the model, call it inside `init_module`, before `setup`."]
    if _MIXED in text:
        ways.append(f"If it computes an output, call model.mark_forward_method({method!r}) after `setup`.")
    if method == "forward":
        ways = [
            "FSDP gathers parameters for the forward of the module that holds them: call that module, or let "
            "FSDPStrategy(wrap=...) put into one unit what is used together."
        ]
    reason = "torch has no such operation on shards" if _NO_RULE in text else "they are sharded there"
    return UsageError(f"{_class(model).__name__}.{method}() uses {parameters}, but {reason}. {' '.join(ways)}")


def explain_backward(error: Exception, names: Mapping[int, str]) -> Exception | None:
    """Return an error that names the gradients that FSDP cannot exchange, or None for another error.

    Args:
        error: The error that the backward raised.
        names: The FQNs of sharded parameters, by the id of the shard.
    """
    text = str(error)
    if _SPARSE not in text and _OTHER_DTYPES not in text:
        return None
    for frame in _frames(error.__traceback__):
        # `foreach_reduce`, whose arguments no object holds.
        params, gradients = frame.get("fsdp_params"), frame.get("unsharded_grads")
        if not params or not gradients:
            continue
        named = {names.get(id(p.sharded_param), "?"): g for p, g in zip(params, gradients, strict=False)}
        sparse = [name for name, gradient in named.items() if gradient.layout != torch.strided]
        if sparse:
            return sparse_gradients(sparse)
        dtypes: dict[torch.dtype, str] = {}
        for name, gradient in named.items():
            dtypes.setdefault(gradient.dtype, name)
        if len(dtypes) > 1:
            listed = ", ".join(f"the gradient of {name} is {dtype}" for dtype, name in dtypes.items())
            return ConfigurationError(
                f"the gradients of one FSDP unit must have one dtype, but {listed}. A parameter of another dtype must "
                "stay frozen, or be in a unit of its own (`FSDPStrategy(wrap=...)`)."
            )
    return None


def sparse_gradients(names: Iterable[str]) -> ConfigurationError:
    """Return the error that refuses sparse gradients of some parameters."""
    return ConfigurationError(
        f"{name_list(names)} would get sparse gradients, which FSDP cannot exchange. Construct the embedding with "
        "sparse=False, freeze it, or use strategy='ddp'."
    )


def _class(module: Any) -> type:
    """Return the user's class of a module that FSDP has given a class of its own."""
    cls = type(module)
    return cls.__mro__[getattr(cls, "_orig_cls_mro_index", 0)]


def _innermost(traceback: TracebackType | None, names: Mapping[int, str]) -> str:
    """Return the FQN of the innermost module of the model whose method was running."""
    found = ""
    for frame in _frames(traceback):
        if isinstance(frame.get("self"), nn.Module):
            found = names.get(id(frame["self"]), found)
    return found


def _frames(traceback: TracebackType | None) -> Iterator[Mapping[str, Any]]:
    """Yield the variables of each function that was running, outermost first."""
    while traceback is not None:
        yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next
