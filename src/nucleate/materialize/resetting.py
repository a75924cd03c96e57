"""Resetting: tensors that the constructor left without a value get one by methods of their modules.

The calls are recorded like a constructor, so that each tensor has a recipe afterwards, and the values are made with all
others: shard by shard, with the same bits under every strategy. `reset_methods.py` chooses the calls. `vacancies.py`
finds the tensors without a value. A model without such tensors is left alone.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nucleate.deferred import Record, handle_of, record_of, resumed
from nucleate.deferred.active import active_record
from nucleate.deferred.adoption import abandon
from nucleate.deferred.stand_ins import stand_ins
from nucleate.errors import UninitializedError, name_list
from nucleate.materialize.inference_tensors import replace_inference_tensors
from nucleate.materialize.reset_methods import OWN_NAMES, ResetCall, reset_calls
from nucleate.materialize.vacancies import Vacancy, adopt_vacancies, vacancies
from nucleate.shells import without_shells

_logger = logging.getLogger(__name__)

# The number of modules that a message explains.
_NUM_EXPLAINED = 5
_METHODS = f"`{OWN_NAMES[0]}` or the like"


@dataclass(frozen=True, slots=True)
class Resets:
    """The methods that initialized tensors, and their tensors.

    Attributes:
        by_method: The method, such as `Linear.reset_parameters`, to the FQNs of the tensors that this method wrote
            last.
        lost: FQNs of tensors that were written on the meta device more often than the methods write them, for example
            by `load_state_dict`. A meta tensor has no memory, so these writes had no effect.
    """

    by_method: dict[str, list[str]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.by_method)

    def __str__(self) -> str:
        count = sum(map(len, self.by_method.values()))
        listed = "; ".join(f"{method} made {name_list(fqns, limit=4)}" for method, fqns in self.by_method.items())
        noun = "tensor" if count == 1 else "tensors"
        return f"{count} {noun} had no value from the constructor or a checkpoint. {listed}"

    def report(self) -> None:
        """Log the methods and their tensors, and warn of writes that had no effect."""
        if self:
            _logger.info("%s.", self)
        if self.lost:
            warnings.warn(
                f"{name_list(self.lost)} were written while they were on the meta device, for example by "
                "`load_state_dict` or `nn.init`. A meta tensor has no memory, so these writes had no effect: `setup` "
                "initialized the tensors by the methods of their modules. Construct the model inside `init_module`, "
                "load it by `runtime.load_raw`, or pass `assign=True` to `load_state_dict`.",
                stacklevel=4,
            )


def reset(model: nn.Module, device: torch.device) -> Resets:
    """Give recipes to the tensors of a model that have no value, by recorded calls of its modules' own methods.

    Each module that holds such a tensor is reset once, children before parents: by its `reset_parameters` (else
    `init_weights`, `_init_weights` or `_reset_parameters`), and then by the nearest `_init_weights(module)` around it.
    A tensor that has a value already keeps it; an inference tensor becomes an ordinary one. Afterwards the random
    generators have the states that the same calls leave.

    Args:
        model: The model.
        device: Tensors that the caller made on the meta device stand for tensors on this device.

    Returns:
        The methods and the tensors that they initialized.

    Raises:
        UninitializedError: A tensor has no value afterwards, or a method failed. Tensors that the caller made on the
            meta device are then unchanged.
        UsageError: The model is being constructed.
    """
    with without_shells(model) as plain:
        return _reset(plain, device)


def _reset(model: nn.Module, device: torch.device) -> Resets:
    replace_inference_tensors(model)
    found = adopt_vacancies(model, device)
    if not found:
        return Resets()
    with torch._C.DisableTorchFunction():
        num_writes = [v.tensor._version if v.is_foreign and not v.tensor.is_inference() else 0 for v in found]
    try:
        calls = reset_calls(model, (module for vacancy in found for module, _, _ in vacancy.owners))
        last_writers = _make(model, found, calls)
        left = vacancies(model)
        if left:
            raise UninitializedError(_explanation(model, left, calls))
    except BaseException:
        abandon(vacancy.tensor for vacancy in found if vacancy.is_foreign)
        raise
    resets = Resets()
    for place, name in last_writers.items():
        resets.by_method.setdefault(name, []).append(found[place].fqn)
        tensor = _now(found[place])
        handle = handle_of(tensor)
        storage = None if handle is None else handle.record.tape.number(tensor)
        if handle is not None and storage is not None:
            handle.record.tape.writer_names[storage] = name
            # One writer is the step that creates the storage.
            if num_writes[place] > len(handle.record.tape.writers(storage)) - 1:
                resets.lost.append(found[place].fqn)
    return resets


def _make(model: nn.Module, found: list[Vacancy], calls: list[tuple[nn.Module, list[ResetCall]]]) -> dict[int, str]:
    """Make the calls, and return for each vacancy the method that wrote its tensor last."""
    by_storage: dict[int, str] = {}
    with resumed(model):
        made_by = record_of(found[0].tensor)
        assert made_by is not None, "a vacancy is deferred"
        record = active_record(made_by.device)
        assert isinstance(record, Record), "it was resumed"
        with stand_ins(model, record, [vacancy.tensor for vacancy in found]):
            for module, of_module in calls:
                for call in of_module:
                    num_steps = len(record.tape.steps)
                    try:
                        call.method(*call.args)
                    except Exception as error:
                        held = name_list(v.fqn for v in found if any(m is module for m, _, _ in v.owners))
                        raise UninitializedError(
                            f"{call} failed, so it could not initialize {held or 'what it contains'}: "
                            f"{type(error).__name__}: {error}"
                        ) from error
                    for step in record.tape.steps[num_steps:]:
                        by_storage.update(dict.fromkeys((*step.writes, *step.creates), call.name))
            numbers = [record.tape.number(_now(vacancy)) for vacancy in found]
    return {place: by_storage[n] for place, n in enumerate(numbers) if n is not None and n in by_storage}


def _now(vacancy: Vacancy) -> Tensor:
    """Return the tensor that is now in the place of a vacancy. A method may have made a new tensor there."""
    module, _, name = vacancy.owners[0]
    tensor = module._parameters.get(name, module._buffers.get(name))
    return vacancy.tensor if tensor is None else tensor


def _explanation(model: nn.Module, left: list[Vacancy], calls: list[tuple[nn.Module, list[ResetCall]]]) -> str:
    """Return a message that lists the tensors without a value, the calls that were made, and the code to add."""
    names = {id(module): name for name, module in model.named_modules()}
    called = {id(module): list(map(str, of_module)) for module, of_module in calls}
    by_owner: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for vacancy in left:
        module, _, name = vacancy.owners[0]
        modules[id(module)] = module
        by_owner.setdefault(id(module), []).append(name)
    sentences = []
    for key, held in list(by_owner.items())[:_NUM_EXPLAINED]:
        cls, attributes = type(modules[key]).__name__, name_list(dict.fromkeys(f"self.{name}" for name in held))
        cure = f"Add `def reset_parameters(self)` to {cls}, and write {attributes} there."
        if key in called:
            was = "was" if len(called[key]) == 1 else "were"
            sentences.append(f"{' and '.join(called[key])} {was} called, but did not write all of {attributes}. {cure}")
            continue
        sentences.append(f"{f'{names[key]} ({cls})' if names[key] else cls} has no {_METHODS}. {cure}")
        outer = [text for other, texts in called.items() if _is_inside(names[key], names[other]) for text in texts]
        if outer:
            sentences.insert(-1, f"{outer[0]} was called, but did not write {attributes}.")
    more = len(by_owner) - _NUM_EXPLAINED
    if more > 0:
        sentences.append(f"The same holds for {more} more modules.")
    return (
        f"nothing initializes {name_list(vacancy.fqn for vacancy in left)}: the constructor left them empty "
        "(`torch.empty` or the like), or made them on the meta device, so they would hold whatever the memory held "
        f"before. {' '.join(sentences)} Or initialize them in the constructor, inside `init_module`."
    )


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")
