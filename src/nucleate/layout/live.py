"""The layout of a live model, kept while the model trains, and the changes of the model since it was set up."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from torch import Tensor, nn

from nucleate.errors import UsageError, name_list
from nucleate.layout.layout import Layout, TensorLayout
from nucleate.layout.reading import layout_of, num_held
from nucleate.shells import named_buffers, named_parameters

#: Shows shards in the place of gathered parameters; see `LiveLayout`.
Shown = Callable[[], AbstractContextManager[object] | None]
#: The attribute of a model that holds its live layout, so that the two live equally long.
_ATTRIBUTE = "_nucleate_layout"


class LiveLayout:
    """The layout of a model that was set up. The model keeps it from now on, and it does not keep the model.

    It refers to the parameters themselves: `torch.utils.swap_tensors`, which `model.to` uses for DTensors, refuses
    tensors with weak references.

    Args:
        model: The model, after its strategy's `setup`.
        world_size: The number of ranks.
        converted: The FQNs of the tensors that a conversion made.
        shown: Returns a context with shards in the place of parameters that a forward has gathered, or None if none is
            gathered. It must not keep the model alive.
    """

    def __init__(
        self,
        model: nn.Module,
        world_size: int,
        converted: Collection[str] = (),
        shown: Shown = lambda: None,
    ) -> None:
        self._model = weakref.ref(model)
        self._world_size = world_size
        self._converted = frozenset(converted)
        self._shown = shown
        self._known: list[_Known] = []
        self._by_id: dict[int, _Known] = {}
        self._places: list[_Place] = []
        self._has_changed = False
        self._is_checked = False
        self._note(model)
        model.__dict__[_ATTRIBUTE] = self

    @staticmethod
    def of(model: nn.Module) -> LiveLayout:
        """Return the layout that a model keeps. The model was set up."""
        live: LiveLayout = model.__dict__[_ATTRIBUTE]
        return live

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickle nothing: a model that was read from a pickle was not set up in this process."""
        return type(None), ()

    @property
    def ids(self) -> set[int]:
        """The ids of the parameters."""
        return set(self._by_id)

    @property
    def layout(self) -> Layout:
        """The layout of the model as it is now.

        Raises:
            UsageError: See `check`.
        """
        self.check()
        with self._shown() or nullcontext():
            return Layout(self._read(self._living()), self._world_size)

    def name_of(self, tensor: Tensor) -> str | None:
        """Return the first FQN of a parameter of the model, or None if the model does not have it."""
        known = self._by_id.get(id(tensor))
        return None if known is None else known.fqn

    def check(self) -> None:
        """Compare the model's parameters with those that were set up. This costs a walk over the modules.

        Raises:
            UsageError: Parameters were added or replaced since then; the message gives their FQNs.
        """
        model = self._living()
        if not self._is_as_noted(model):
            self._look_closely(model)
        self._is_checked = True

    def take_change(self) -> bool:
        """Return, once, whether other parameters require gradients than before, or some are gone."""
        changed, self._has_changed = self._has_changed, False
        return changed

    def check_once(self) -> None:
        """Check the model, unless it was checked since the last call; see `check`."""
        if not self._is_checked:
            self.check()
        self._is_checked = False

    def refuse_emptied(self, action: str) -> None:
        """Refuse parameters that have lost their values to an engine that keeps them elsewhere, as DeepSpeed's does.

        Args:
            action: The action that needs the values, for the message.

        Raises:
            UsageError: A parameter has fewer elements than when it was set up; the message gives the FQNs.
        """
        emptied = [known.fqn for known in self._known if known.is_emptied()]
        if emptied:
            raise UsageError(
                f"{action} needs the values of {name_list(emptied)}, but these parameters have become empty since "
                "`setup`: the strategy keeps their values elsewhere. Use the engine of the strategy's library for it."
            )

    def of_copy(self, model: nn.Module, shown: Shown = lambda: None) -> LiveLayout:
        """Return the layout of a copy of the model; see the class for the arguments."""
        return LiveLayout(model, self._world_size, self._converted, shown)

    def _living(self) -> nn.Module:
        model = self._model()
        assert model is not None, "whoever asks holds the model"
        return model

    def _note(self, model: nn.Module) -> None:
        names: dict[int, str] = {}
        for fqn, parameter in named_parameters(model, remove_duplicate=False):
            names.setdefault(id(parameter), fqn)
        parameters = list(_parameters(model))
        self._known = [_Known(names[id(parameter)], parameter) for parameter in parameters]
        self._places = _places(model)
        self._by_id = {}
        for known, parameter in zip(self._known, parameters, strict=True):
            self._by_id.setdefault(id(parameter), known)

    def _is_as_noted(self, model: nn.Module) -> bool:
        """Return quickly whether all registries hold what they held, and the same parameters train."""
        for place in self._places:
            module = model if place.module is None else place.module
            if list(map(id, module._parameters.values())) != place.parameters:
                return False
            if list(map(id, module._modules.values())) != place.modules:
                return False
        return all(known.tensor.requires_grad is known.trains for known in self._known)

    def _look_closely(self, model: nn.Module) -> None:
        known, changed, gathered = iter(self._known), False, False
        for parameter in _parameters(model):
            place = next(known, None)
            if place is None or not place.matches(parameter):
                self._compare(model)
                return
            changed = changed or parameter.requires_grad is not place.trains
            gathered = gathered or parameter is not place.tensor
        if changed or next(known, None) is not None:
            self._compare(model)
        elif not gathered:
            # Only modules without parameters have changed.
            self._places = _places(model)

    def _compare(self, model: nn.Module) -> None:
        """Find the parameters that are new. A gathered parameter is the known one in another form."""
        forms = dict(named_parameters(model, remove_duplicate=False))
        with self._shown() or nullcontext():
            self._compare_shown(model, forms)

    def _compare_shown(self, model: nn.Module, forms: Mapping[str, nn.Parameter]) -> None:
        by_fqn = {known.fqn: known for known in self._known}
        strange = []
        for fqn, parameter in named_parameters(model, remove_duplicate=False):
            known = self._by_id.get(id(parameter))
            if known is None:
                strange.append(fqn)
            elif forms.get(fqn) is not parameter and fqn in forms:
                by_fqn[known.fqn].gathered = forms[fqn]
        if strange:
            raise UsageError(
                f"{name_list(strange)} came into the model after `setup`, so the strategy "
                "neither lays them out nor exchanges their gradients. Add and replace modules and parameters before "
                "`setup`, for example inside `init_module`; then set the model up."
            )
        present = {id(parameter) for parameter in _parameters(model)}
        gone = [known for known in self._known if id(known.tensor) not in present]
        trains = [parameter.requires_grad for parameter in _parameters(model)]
        if gone or trains != [known.trains for known in self._known]:
            self._has_changed = True
            gathered = {known.fqn: known.gathered for known in self._known}
            self._note(model)
            for known in self._known:
                known.gathered = gathered[known.fqn]

    def _read(self, model: nn.Module) -> dict[str, TensorLayout]:
        ties: dict[int, list[str]] = {}
        found: dict[str, TensorLayout] = {}
        tensors: dict[str, Tensor] = dict(named_parameters(model, remove_duplicate=False))
        buffers = dict(named_buffers(model, remove_duplicate=False))
        for fqn, tensor in (*tensors.items(), *buffers.items()):
            ties.setdefault(id(tensor), []).append(fqn)
            read = layout_of(tensor, self._world_size)
            found[fqn] = replace(read, converted=fqn in self._converted, is_buffer=fqn in buffers)
        for names in ties.values():
            for fqn in names if len(names) > 1 else ():
                found[fqn] = replace(found[fqn], tied_with=tuple(name for name in names if name != fqn))
        return found


class _Known:
    """A parameter that was set up, in one of its places.

    Attributes:
        fqn: The parameter's first name.
        tensor: The parameter.
        gathered: The same parameter in the form that it has while it is gathered, once that was seen.
        trains: Whether it required gradients at the last check.
    """

    __slots__ = ("_numel", "fqn", "gathered", "tensor", "trains")

    def __init__(self, fqn: str, parameter: nn.Parameter) -> None:
        self.fqn = fqn
        self.tensor = parameter
        self.gathered: nn.Parameter | None = None
        self.trains = parameter.requires_grad
        self._numel = num_held(parameter)

    def matches(self, parameter: nn.Parameter) -> bool:
        return self.tensor is parameter or self.gathered is parameter

    def is_emptied(self) -> bool:
        return self._numel > 0 and num_held(self.tensor) == 0


class _Place:
    """A module, and the ids of what its registries held.

    Attributes:
        module: The module, or None for the model itself, which the layout must not keep alive.
        parameters: The ids of its parameters.
        modules: The ids of its children.
    """

    __slots__ = ("module", "modules", "parameters")

    def __init__(self, module: nn.Module, is_root: bool) -> None:
        self.module = None if is_root else module
        self.parameters = list(map(id, module._parameters.values()))
        self.modules = list(map(id, module._modules.values()))


def _places(model: nn.Module) -> list[_Place]:
    return [_Place(module, module is model) for module in model.modules()]


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameter of each place, quicker than `named_parameters` and by what the registries hold."""
    seen: set[nn.Module] = set()
    left = [model]
    while left:
        module = left.pop()
        if module in seen:
            continue
        seen.add(module)
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter
        left.extend(child for child in reversed(module._modules.values()) if child is not None)
