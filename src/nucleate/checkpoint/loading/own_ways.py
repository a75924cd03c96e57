"""Modules that load in their own way: hooks, and classes with a `_load_from_state_dict` of their own.

Such code renames, splits, joins and permutes the tensors that older versions wrote. It runs here on deferred tensors
that stand for those in the checkpoint, so it computes and copies nothing. `run_own_ways` finds each tensor that the
code would copy into a parameter. The load's plan reads this tensor like any other, each rank its own part.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys
from torch.nn.parameter import is_lazy

from nucleate.checkpoint.loading.capture import Capture, UnplannedWriteError
from nucleate.checkpoint.loading.stored_form import StoredForm
from nucleate.checkpoint.stored.computed_tensor import ComputedTensor
from nucleate.checkpoint.stored.tensor import StoredTensor
from nucleate.deferred import ComputedSource, TensorSource, bind, deferred, record_of, resumed
from nucleate.errors import CheckpointError, name_list

# The beginning of torch's message about another shape.
_MISMATCH = "size mismatch for "


@dataclass(frozen=True)
class Replaced:
    """A tensor that a module's own code puts into a module.

    Attributes:
        module: The module.
        name: The attribute's name.
        stored: Its elements.
        like: The tensor that the code has made, without elements.
        is_buffer: Whether it is a buffer of the module.
    """

    module: nn.Module
    name: str
    stored: StoredTensor
    like: Tensor
    is_buffer: bool

    def put(self, value: Tensor) -> None:
        """Put a real tensor into the module."""
        if isinstance(self.like, nn.Parameter):
            value = nn.Parameter(value, self.like.requires_grad)
        if self.is_buffer:
            persistent = self.name not in self.module._non_persistent_buffers_set
            self.module.register_buffer(self.name, value, persistent)
        else:
            setattr(self.module, self.name, value)


@dataclass
class Outcome:
    """The effect of a module's own code on the module's stored tensors.

    Attributes:
        tensors: The stored tensor that the code copies into each tensor of the module, by the module's name; and the
            tensors that are left over, by the name that the code gave them.
        targets: The tensors of the module that the code copies into, by name.
        replaced: Tensors of another shape, or of a new name, that the code puts into the module.
        missing: The names that the code reports as missing.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    replaced: list[Replaced] = field(default_factory=list)
    missing: set[str] = field(default_factory=set)


def has_own_ways(module: nn.Module) -> bool:
    """Return whether a module or one of its submodules does more than copying when it loads a state dict."""
    return any(
        part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks or _overrides(part)
        for part in module.modules()
    )


def _overrides(part: nn.Module) -> bool:
    method = type(part)._load_from_state_dict
    # The method of batch norms only fills in a counter that old checkpoints lack.
    ours = method is nn.Module._load_from_state_dict or method.__module__ == "torch.nn.modules.batchnorm"
    return not ours and not isinstance(part, StoredForm)


def run_own_ways(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    versions: Mapping[str, int],
    path: str,
) -> Outcome:
    """Run a module's own code for loads, and return the copies that it would make. Nothing is copied.

    Args:
        module: The module, deferred or real.
        state_dict: The module's own state dict, `keep_vars=True`.
        stored: The stored tensors, by the names that a state dict would have.
        versions: The saved versions of the module and its submodules, by name.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: The module refuses the stored tensors, or writes its tensors in a way that cannot be planned.
    """
    outcome, errors = Outcome(), list[str]()
    outside = {id(value): name for name, value in state_dict.items()}
    with deferred("cpu"):
        local: OrderedDict[str, Any] = OrderedDict()
        made: dict[Any, Tensor] = {}
        for name, tensor in stored.items():
            if name.endswith(_EXTRA_STATE_KEY_SUFFIX):
                continue
            place = (tensor.dtype, tensor.shape, tensor.chunks or id(tensor))
            if place not in made:
                made[place] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                if tensor.numel:
                    bind(made[place], tensor)
            local[name] = made[place]
        with _restored(module) as changes, Capture(module) as capture:
            sources = _load(module, local, "", versions, outcome, errors, capture)
            changes.find(sources, outcome)
    if errors:
        raise CheckpointError(f"{type(module).__name__} refuses {path}: {name_list(errors)}")
    originals = {id(tensor): tensor for tensor in stored.values()}
    for inside, (target, value) in sources.items():
        name = inside if inside in state_dict else outside.get(id(target), inside)
        outcome.tensors[name] = _stored_of(name, value, originals)
        if target is not None:
            outcome.targets[name] = target
    outcome.replaced = [
        Replaced(owner, name, _stored_of(name, value, originals), value, is_buffer)
        for owner, name, value, is_buffer in changes.new
    ]
    inner = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    outcome.missing = {n if n in state_dict else outside.get(id(inner.get(n)), n) for n in outcome.missing}
    return outcome


class _Changes:
    """The tensors that modules held before their own code ran, and the tensors that the code put there.

    Args:
        root: The module.

    Attributes:
        new: The tensors of another shape or of a new name: module, name, tensor, and whether it is a buffer.
    """

    def __init__(self, root: nn.Module) -> None:
        self.new: list[tuple[nn.Module, str, Tensor, bool]] = []
        self._before = [
            (
                prefix,
                module,
                dict(module._parameters),
                dict(module._buffers),
                dict(module._modules),
                _attributes(module),
            )
            for prefix, module in root.named_modules()
        ]

    def find(self, sources: dict[str, tuple[Tensor | None, Any]], outcome: Outcome) -> None:
        """Treat a tensor that took the place of another one as a copy into that one.

        Args:
            sources: The tensor of each name, and the value that is copied into it. Receives more of them.
            outcome: Its `missing` loses the names that the code has set.
        """
        for prefix, module, parameters, buffers, modules, attributes in self._before:
            if modules != module._modules:
                raise UnplannedWriteError(
                    f"{type(module).__name__} ({prefix or 'the model'}) makes or replaces modules while it loads. "
                    "`load_raw` and `load` plan their reads, and cannot run such code. Set the model up, and pass the "
                    "result of `runtime.load(path)` to `model.load_state_dict`."
                )
            here = f"{prefix}." if prefix else ""
            now = {**module._parameters, **module._buffers, **_attributes(module)}
            before = {**parameters, **buffers, **attributes}
            for name, tensor in now.items():
                old = before.get(name)
                if tensor is None or tensor is old or is_lazy(tensor):
                    continue
                outcome.missing.discard(f"{here}{name}")
                if old is not None and old.shape == tensor.shape and name not in attributes:
                    sources[f"{here}{name}"] = (old, tensor)
                else:
                    sources.pop(f"{here}{name}", None)
                    self.new.append((module, name, tensor, name in module._buffers))

    def undo(self) -> None:
        """Give each module its former tensors and submodules back."""
        for _, module, parameters, buffers, modules, attributes in self._before:
            registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module._modules)
            for registry, held in zip(registries, (parameters, buffers, modules), strict=True):
                registry.clear()
                registry.update(held)
            for name in _attributes(module):
                if name not in attributes:
                    del module.__dict__[name]
            module.__dict__.update(attributes)


def _attributes(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


@contextmanager
def _restored(module: nn.Module) -> Iterator[_Changes]:
    changes = _Changes(module)
    try:
        yield changes
    finally:
        changes.undo()


def run_post_hooks(module: nn.Module, missing: Iterable[str]) -> None:
    """Call the hooks that come after loading, in torch's order. On a deferred module, their operations are recorded.

    Args:
        module: The module.
        missing: The names that were missing.
    """
    if not any(part._load_state_dict_post_hooks for part in module.modules()):
        return
    keys = _IncompatibleKeys(sorted(missing), [])
    with resumed(module):
        _run_post_hooks(module, keys)


def _run_post_hooks(module: nn.Module, keys: Any) -> None:
    for child in module._modules.values():
        if child is not None:
            _run_post_hooks(child, keys)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, keys)


def _load(
    module: nn.Module,
    local: dict[str, Any],
    prefix: str,
    versions: Mapping[str, int],
    outcome: Outcome,
    errors: list[str],
    capture: Capture,
) -> dict[str, tuple[Tensor | None, Any]]:
    """Do the work of `nn.Module.load_state_dict` for a module and its submodules (torch/nn/modules/module.py, 2.13).

    Returns:
        Each tensor and the value that is copied into it, by its name inside the root; and the values left over, without
        a tensor.
    """
    if isinstance(module, StoredForm):
        # The form chooses from the stored tensors by itself.
        return {name: (None, value) for name, value in local.items()}
    name = prefix.removesuffix(".")
    metadata = {"version": versions[name]} if name in versions else {}
    missing, unexpected, refused = list[str](), list[str](), list[str]()
    capture.module, capture.prefix = module, prefix
    module._load_from_state_dict(local, prefix, metadata, True, missing, unexpected, refused)
    found: dict[str, tuple[Tensor | None, Any]] = dict(capture.taken())
    wrong_shapes = {error.removeprefix(_MISMATCH).partition(":")[0] for error in refused if error.startswith(_MISMATCH)}
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        # The plan reports these.
        if tensor is not None and f"{prefix}{own}" in wrong_shapes:
            found[f"{prefix}{own}"] = (tensor, local[f"{prefix}{own}"])
    errors.extend(error for error in refused if not error.startswith(_MISMATCH))
    outcome.missing.update(key for key in missing if not key.endswith(_EXTRA_STATE_KEY_SUFFIX))
    for key in unexpected:
        if key in local:
            found[key] = (None, local[key])
    for child_name, child in module._modules.items():
        if child is not None:
            inner = f"{prefix}{child_name}."
            under = {key: value for key, value in local.items() if key.startswith(inner)}
            found.update(_load(child, under, inner, versions, outcome, errors, capture))
    return found


def _stored_of(name: str, value: Any, originals: Mapping[int, StoredTensor]) -> StoredTensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name} is loaded from a {type(value).__name__}, which is not a tensor.")
    if record_of(value) is None:
        return ComputedTensor.of(name, TensorSource(value.detach().cpu()))
    computed = ComputedSource(value)
    # The tensor of the file itself: it may be mapped, or tied to another name.
    original = originals.get(id(computed.given()))
    return ComputedTensor.of(name, computed) if original is None else original
