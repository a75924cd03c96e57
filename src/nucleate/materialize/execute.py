"""The execution of a plan: each value is made once, in its final place.

A value is swapped into its deferred tensor, so that every reference to the tensor (ties, optimizers, lists) sees the
value. Where a strategy has sharded the parameter in the meantime, the local shard is filled instead: directly, or by a
copy from the whole value, which is then freed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from nucleate.deferred.elements import TensorSource
from nucleate.deferred.replay import view
from nucleate.devices import concrete
from nucleate.errors import UninitializedError, name_list
from nucleate.materialize.conversions import Conversions
from nucleate.materialize.device_parts import parts_on
from nucleate.materialize.installation import install
from nucleate.materialize.making import make_parts
from nucleate.materialize.memory import FreshMemory
from nucleate.materialize.parts import Part
from nucleate.materialize.plan import Group, Plan
from nucleate.materialize.reading import read_into
from nucleate.materialize.recipe import is_moved_to
from nucleate.materialize.resetting import reset
from nucleate.materialize.shards import allocate_shards, fill, parts_of_shard, take_back_shards
from nucleate.shells import named_buffers, named_parameters

_logger = logging.getLogger(__name__)


def materialize(model: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Materialize every deferred tensor of `model` on `device`, in place. Real tensors do not change.

    Tensors without a recipe get one first, by the methods of their modules such as `reset_parameters`; see `reset`.
    Inference tensors, which nothing can train, become ordinary tensors with the same values and memory.

    Args:
        model: The model.
        device: The device on which values are made and stay.

    Returns:
        The same model.

    Raises:
        UninitializedError: See `reset` and `Plan.of`; the model is then unchanged.
        DeferredUseError: The model was constructed for another kind of device, or the device is absent.
    """
    device = concrete(device)
    reset(model, device).report()
    plan = Plan.of(model)
    plan.check_device(device)
    plan.release()
    execute(plan, model, device)
    return model


def execute(plan: Plan, model: nn.Module, device: torch.device, shard_device: torch.device | None = None) -> None:
    """Materialize the tensors of a released plan.

    Between `Plan.of` and this call a strategy may have replaced parameters by DTensors on the meta device, as
    `fully_shard` does. These get only this rank's shard; every other tensor gets its whole value.

    Args:
        plan: The plan.
        model: The model of the plan.
        device: The device on which values are made. `"cpu:0"` is the CPU, as for `materialize`.
        shard_device: The device that keeps shards; by default `device`.

    Raises:
        UninitializedError: A tensor still has no value afterwards, which is a fault of nucleate.
    """
    device = concrete(device)
    shard_device = device if shard_device is None else concrete(shard_device)
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    for module in recurrent:
        # `swap_tensors` refuses tensors with weak references, which these modules keep (torch/nn/modules/rnn.py).
        module._flat_weight_refs = []
    allocated: set[int] = set()
    try:
        shards = allocate_shards(model, shard_device, allocated)
        with ExitStack() as stack:
            for record in plan.records:
                stack.enter_context(record.making())
            rest = _make_in_parts(plan.groups, device, shards)
            scratches = _scratches(rest, device)
            for group in rest:
                where = _made_on(group, device)
                storage = group.source.make(where, scratches.get(where) if _is_sharded(group) else None)
                if where == device:
                    _install_group(group, storage)
                else:
                    _send_shards(group, storage)
            del scratches
    except BaseException:
        # Tensors without a value are still deferred: they can be made later, and must not be used or edited meanwhile.
        # Shards lose their memory, which nothing has written. A later attempt refuses shards without memory.
        take_back_shards(model, allocated)
        plan.restore()
        raise
    finally:
        for module in recurrent:
            module._flat_weight_refs = [None if w is None else weakref.ref(w) for w in module._flat_weights]
    for module in recurrent:
        module.flatten_parameters()  # cuDNN needs the weights in one buffer; nothing happens elsewhere.
    _verify(model)


def _make_in_parts(
    groups: Sequence[Group], device: torch.device, shard_storages: Sequence[torch.UntypedStorage]
) -> list[Group]:
    """Make the groups whose ranges can be made alone, shards directly in their place. Return the other groups."""
    conversions = Conversions(groups, device)
    parts: list[Part] = []
    rest: list[Group] = []
    made: list[tuple[Group, torch.UntypedStorage]] = []
    for group in conversions.rest:
        maker = group.source.maker(device)
        if maker is None:
            rest.append(group)
            continue
        shards = [(target, shard) for target in group.targets for shard in target.shards()]
        if shards and _is_sharded(group):
            boxes = [parts_of_shard(maker, target.ref, shard) for target, shard in shards]
            if any(box is None for box in boxes):
                rest.append(group)
            else:
                parts.extend(part for box in boxes if box is not None for part in box)
            continue
        held = maker.memory() if device.type == "cpu" else None
        if held is not None:
            group.source.keep(held)
            _install_group(group, held)
            continue
        flat = torch.empty(maker.numel, dtype=maker.dtype, device=device)
        storage = flat.untyped_storage()
        if storage.nbytes() != group.source.size_bytes:  # The last bytes are no whole element.
            storage.resize_(group.source.size_bytes)
        made.append((group, storage))
        parts.extend(parts_on(maker, 0, flat.shape, (0,), flat))
    parts.extend(conversions.parts())
    memory = FreshMemory([*(storage for _, storage in made), *conversions.storages(), *shard_storages])
    make_parts(parts, torch.get_num_threads(), memory)
    if memory:
        _logger.info("New memory that this process has touched: %s.", memory.describe())
    for group, storage in (*made, *conversions.finish()):
        group.source.keep(storage)
        _install_group(group, storage)
    return rest


def _install_group(group: Group, storage: torch.UntypedStorage) -> None:
    for target in group.targets:
        value = view(storage, target.ref)
        shards = target.shards()
        if shards:
            for shard in shards:
                fill(shard, value)
        else:
            install(target.tensor, target.cls, target.holders, value)


def _is_sharded(group: Group) -> bool:
    return all(target.shards() for target in group.targets)


def _made_on(group: Group, device: torch.device) -> torch.device:
    """Return where to make a value whole. A sharded value recorded for the CPU is made there; only its shards move."""
    record = group.source.record
    return record.device if is_moved_to(record, device) and _is_sharded(group) else device


def _send_shards(group: Group, storage: torch.UntypedStorage) -> None:
    """Copy this rank's shards of a value that was made on the CPU to the device of the shards."""
    values = [(target, TensorSource(view(storage, target.ref))) for target in group.targets]
    read_into([(shard, value) for target, value in values for shard in target.shards()])


def _scratches(groups: Sequence[Group], device: torch.device) -> dict[torch.device, torch.UntypedStorage]:
    """Return memory for the largest value that is kept only as a shard, so that it is allocated and touched once."""
    sizes: dict[torch.device, int] = {}
    for group in groups:
        if _is_sharded(group):
            where = _made_on(group, device)
            sizes[where] = max(sizes.get(where, 0), group.source.size_bytes)
    return {where: torch.UntypedStorage(size_bytes, device=where) for where, size_bytes in sizes.items()}


def _verify(model: nn.Module) -> None:
    left = [name for name, tensor in (*named_parameters(model), *named_buffers(model)) if tensor.is_meta]
    if left:
        raise UninitializedError(
            f"{name_list(left)} have no value after materialization. This is a fault of nucleate: please report it."
        )
