"""Vacancies: the tensors of a model that nothing gives a value, found before materialization.

There are two kinds: deferred tensors that the constructor left empty (`torch.empty`), and tensors of modules that the
user built on the meta device. `resetting.py` fills both; this module only finds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nucleate.deferred import handle_of, held_tensors, is_recording
from nucleate.deferred.adoption import adopt, is_adoptable
from nucleate.deferred.guards import is_edited
from nucleate.deferred.tape import is_written
from nucleate.errors import UsageError
from nucleate.materialize.handover import is_released
from nucleate.shells import named_modules


@dataclass(slots=True)
class Vacancy:
    """A tensor without a value: one object, which the model holds in one place, or in several tied places.

    Attributes:
        tensor: The tensor.
        is_foreign: Whether the tensor is on the meta device and does not belong to a recording.
        owners: The modules that hold the tensor, each with the tensor's FQN and its name in the module.
    """

    tensor: Tensor
    is_foreign: bool
    owners: list[tuple[nn.Module, str, str]] = field(default_factory=list)

    @property
    def fqn(self) -> str:
        """Its first name."""
        return self.owners[0][1]


def vacancies(model: nn.Module) -> list[Vacancy]:
    """Return the tensors of a model that nothing gives a value. The model does not change.

    Raises:
        UsageError: The model is being constructed.
    """
    refuse_recording()
    found: dict[int, Vacancy] = {}
    whole = set[int]()
    barren = set[int]()
    with torch._C.DisableTorchFunctionSubclass():
        for prefix, module in named_modules(model):
            for kind, name, tensor in held_tensors(module, barren):
                if id(tensor) in whole:
                    continue
                if id(tensor) not in found:
                    is_vacant, is_foreign = _look(kind, tensor)
                    if not is_vacant:
                        whole.add(id(tensor))
                        continue
                    found[id(tensor)] = Vacancy(tensor, is_foreign)
                fqn = f"{prefix}.{name}" if prefix else name
                found[id(tensor)].owners.append((module, fqn, name))
    return list(found.values())


def adopt_vacancies(model: nn.Module, device: torch.device) -> list[Vacancy]:
    """Turn the meta tensors of a model that do not belong to a recording into empty deferred tensors.

    Args:
        model: The model.
        device: The device of these tensors, if no other deferred tensor of the model has one.

    Returns:
        The vacancies. `is_foreign` marks those that were turned into deferred tensors.
    """
    found = vacancies(model)
    foreign = [vacancy for vacancy in found if vacancy.is_foreign]
    if foreign:
        adopt([(vacancy.fqn, vacancy.tensor) for vacancy in foreign], _device_of(model) or device)
    return found


def refuse_recording() -> None:
    """Refuse to set a model up inside the context that constructs it.

    Raises:
        UsageError: This thread is inside such a context.
    """
    if is_recording():
        raise UsageError(
            "a model cannot be set up inside the context that constructs it, where nothing has a value yet. End "
            "the `init_module` block first."
        )


def is_vacant(tensor: Tensor) -> bool:
    """Return whether a deferred tensor has an element that nothing has written."""
    handle = handle_of(tensor)
    if handle is None or is_edited(tensor, handle):
        return False
    tape = handle.record.tape
    return not is_written(tape, tape.ref(tensor))


def _look(kind: str, tensor: Tensor) -> tuple[bool, bool]:
    """Return whether a tensor has no value, and whether it does not belong to a recording."""
    if handle_of(tensor) is not None:
        return is_vacant(tensor), False
    # A plain attribute on the meta device may exist only for its shape.
    foreign = kind != "attribute" and not is_released(tensor) and is_adoptable(tensor)
    return foreign, foreign


def _device_of(model: nn.Module) -> torch.device | None:
    """Return the device for which the deferred tensors of a model were constructed, or None without such tensors."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            handle = handle_of(tensor)
            if handle is not None:
                return handle.record.device
    return None
