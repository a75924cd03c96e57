"""The context `sharding`: a deferred model is sharded before it has values, and each rank then makes its own shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from nucleate.errors import ConfigurationError, DeferredEditError, RankDisagreementError, name_list
from nucleate.materialize import Plan, execute, reset


@contextmanager
def sharding(model: nn.Module, device: torch.device | str | None = None) -> Iterator[None]:
    """Shard a deferred model inside this context. On exit each rank makes its shards, and whatever was not sharded.

    Inside, the model's tensors are plain tensors on the meta device, as `fully_shard` and `parallelize_module` take
    them. Do nothing else with them there. Every rank enters the context.

    Args:
        model: The model, or a part of one. It was constructed inside `deferred()`.
        device: The device on which values are made. None takes that of the first sharded parameter, or the CPU.

    Raises:
        RankDisagreementError: The ranks constructed different models, or from different seeds. Every rank raises it.
        DeferredEditError: A tensor was edited inside the context.
        ConfigurationError: A tie between two parameters was undone inside the context.
        UninitializedError: Nothing initializes a parameter; see `nucleate.materialize.reset`.

    Example:
        >>> import torch
        >>> from nucleate.deferred import deferred
        >>> from nucleate_lightning import sharding
        >>> with deferred():
        ...     model = torch.nn.Linear(4, 4)
        >>> with sharding(model):
        ...     pass  # fully_shard(model, mesh=self.device_mesh["data_parallel"])
        >>> model.weight.shape
        torch.Size([4, 4])
    """
    reset(model, torch.device("cpu" if device is None else device)).report()
    plan = Plan.of(model)
    _refuse_disagreement(plan)
    ties = _ties(model)
    plan.release()
    versions = [(target, target.tensor._version) for target in plan.targets]
    try:
        yield
        edited = [target.fqn for target, version in versions if target.tensor._version != version]
        # A shard begins at version 0 (torch/distributed/fsdp/_fully_shard/_fsdp_param.py, 2.13).
        edited += [name for name, shard in _shards(model) if shard.is_meta and shard._version]
        if edited:
            raise DeferredEditError(
                f"{name_list(edited)} were edited inside `sharding`, where they have no value, so the edit would be "
                "lost. Edit them inside `deferred()` before, or afterwards."
            )
        _refuse_untied(model, ties)
        where = torch.device(device or _device_of_shards(model))
        plan.check_device(where)
    except BaseException:
        plan.restore()
        raise
    execute(plan, model, where)


def _refuse_disagreement(plan: Plan) -> None:
    """Compare what the ranks recorded: shards of different models would make a model that nobody constructed."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    digests: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(digests, plan.digest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise RankDisagreementError(
            f"ranks {name_list(map(str, others))} recorded another construction than rank 0: another model, or the same "
            "one from another seed. Call `lightning.seed_everything` with one seed on all ranks before you construct "
            "the model."
        )


def _ties(model: nn.Module) -> list[list[str]]:
    """Return the names that stand for one parameter, for each parameter with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def _refuse_untied(model: nn.Module, ties: list[list[str]]) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    undone = [tied for tied in ties if len({id(named[name]) for name in tied if name in named}) > 1]
    if undone:
        raise ConfigurationError(
            f"{name_list([name for tied in undone for name in tied])} were tied, and sharding gave each of them a "
            "parameter of its own. Shard their modules in one group, or tie them again inside `sharding`."
        )


def _shards(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            yield name, parameter


def _device_of_shards(model: nn.Module) -> str:
    return next((shard.device_mesh.device_type for _, shard in _shards(model)), "cpu")
