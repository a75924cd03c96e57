"""Modules that load in their own way: hooks, and classes with a `_load_from_state_dict` of their own.

Such code renames, splits, joins and permutes what older versions wrote. It is run here on deferred tensors that stand
for those in the checkpoint. So it computes nothing and copies nothing: what it would copy into a parameter is found,
and the load's plan reads it as it reads any tensor, each rank its own part.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX, _IncompatibleKeys
from torch.overrides import TorchFunctionMode

from nucleate.checkpoint.computed import ComputedTensor
from nucleate.checkpoint.stored import StoredTensor
from nucleate.checkpoint.stored_form import StoredForm
from nucleate.deferred import ComputedGiven, TensorGiven, deferred, give, record_of, resumed
from nucleate.deferred.refusal import is_edit
from nucleate.errors import CheckpointError, name_list


@dataclass
class Outcome:
    """The effect of a module's own code on what is stored for it.

    Attributes:
        tensors: What is copied into each tensor of the module, by its name; and what is left over, by the name that
            the code has given to it.
        targets: The tensors of the module that something is copied into, by name.
        missing: The names that the code says are missing.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)


def has_own_ways(module: nn.Module) -> bool:
    """Return whether a module, or one inside, does more than copying when it loads a state dict."""
    return any(
        part._load_state_dict_pre_hooks or part._load_state_dict_post_hooks or _overrides(part)
        for part in module.modules()
    )


def _overrides(part: nn.Module) -> bool:
    method = type(part)._load_from_state_dict
    # That of batch norms fills in a counter that old checkpoints lack.
    ours = method is nn.Module._load_from_state_dict or method.__module__ == "torch.nn.modules.batchnorm"
    return not ours and not isinstance(part, StoredForm)


def run_own_ways(
    module: nn.Module,
    state_dict: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    versions: Mapping[str, int],
    path: str,
) -> Outcome:
    """Run what a module does when it loads, and return what it would copy, without copying anything.

    Args:
        module: The module, deferred or real.
        state_dict: Its own, `keep_vars=True`.
        stored: What is stored, by the names that a state dict would have.
        versions: The versions of the modules inside, by name, as they were saved.
        path: The checkpoint, for messages.

    Raises:
        CheckpointError: The module refuses what is stored, or writes its tensors in a way that cannot be planned.
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
                    give(made[place], tensor)
            local[name] = made[place]
        with _Capture(module) as capture:
            sources = _load(module, local, "", versions, outcome, errors, capture)
    if errors:
        raise CheckpointError(f"{type(module).__name__} refuses {path}: {name_list(errors)}")
    originals = {id(tensor): tensor for tensor in stored.values()}
    for inside, (target, value) in sources.items():
        name = inside if inside in state_dict else outside.get(id(target), inside)
        outcome.tensors[name] = _stored_of(name, value, originals)
        if target is not None:
            outcome.targets[name] = target
    inner = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    outcome.missing = {n if n in state_dict else outside.get(id(inner.get(n)), n) for n in outcome.missing}
    return outcome


def run_post_hooks(module: nn.Module) -> None:
    """Call the hooks that come after loading, in torch's order; on a deferred module what they do is recorded."""
    with resumed(module):
        _run_post_hooks(module)


def _run_post_hooks(module: nn.Module) -> None:
    for child in module._modules.values():
        if child is not None:
            _run_post_hooks(child)
    for hook in module._load_state_dict_post_hooks.values():
        hook(module, _IncompatibleKeys([], []))


def _load(
    module: nn.Module,
    local: dict[str, Any],
    prefix: str,
    versions: Mapping[str, int],
    outcome: Outcome,
    errors: list[str],
    capture: _Capture,
) -> dict[str, tuple[Tensor | None, Any]]:
    """Do as `nn.Module.load_state_dict` does for one module and those inside (torch/nn/modules/module.py, 2.13).

    Returns:
        What is copied into each tensor, by its name inside the module, with the tensor; and what is left over.
    """
    if isinstance(module, StoredForm):
        # It says by itself what it makes of what is stored.
        return {name: (None, value) for name, value in local.items()}
    name = prefix.removesuffix(".")
    metadata = {"version": versions[name]} if name in versions else {}
    missing, unexpected, refused = list[str](), list[str](), list[str]()
    capture.module, capture.prefix = module, prefix
    module._load_from_state_dict(local, prefix, metadata, True, missing, unexpected, refused)
    found: dict[str, tuple[Tensor | None, Any]] = dict(capture.taken())
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        # What has another shape is for the plan to report.
        if tensor is not None and f"{prefix}{own}" in local and f"{prefix}{own}" not in found:
            found[f"{prefix}{own}"] = (tensor, local[f"{prefix}{own}"])
    errors.extend(error for error in refused if not error.startswith(tuple(f"size mismatch for {n}:" for n in found)))
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
        return ComputedTensor.of(name, TensorGiven(value.detach().cpu()))
    computed = ComputedGiven(value)
    # As it is in the file: it may be mapped, or tied to another name.
    original = originals.get(id(computed.given()))
    return ComputedTensor.of(name, computed) if original is None else original


class _Capture(TorchFunctionMode):
    """Notes what is copied into a module's tensors instead of copying it, and refuses any other write to them.

    Args:
        root: The module that loads.
    """

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.module = root
        self.prefix = ""
        self._tensors: Sequence[tuple[str, Tensor]] = [
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        ]
        self._names: dict[int, list[str]] = {}
        for name, tensor in self._tensors:
            self._names.setdefault(_place(tensor), []).append(name)
        self._taken: dict[str, tuple[Tensor, Any]] = {}

    def taken(self) -> dict[str, tuple[Tensor, Any]]:
        """Return what was copied since the last call, by the name inside the root."""
        taken, self._taken = self._taken, {}
        return taken

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else None
        if isinstance(target, Tensor) and (is_edit(func) or func == _SET_DATA):
            names = self._names.get(_place(target))
            if names is not None:
                return self._write(func, target, names, args, kwargs)
        return func(*args, **kwargs)

    def _write(self, func: Any, target: Tensor, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = {f"{self.prefix}{name}" for name in (*self.module._parameters, *self.module._buffers)}
        name = next((name for name in names if name in own), names[0])
        whole = next(tensor for other, tensor in self._tensors if other == name)
        with torch._C.DisableTorchFunction():
            is_whole = (target.size(), target.stride()) == (whole.size(), whole.stride())
        if func is not Tensor.copy_ or not is_whole:
            raise CheckpointError(
                f"{type(self.module).__name__} ({self.prefix.removesuffix('.') or 'the model'}) writes {name} by "
                f"{getattr(func, '__name__', func)} while it loads. Before `setup`, and from a checkpoint of other "
                "names, a module may only copy whole tensors. Set the model up, and give what `runtime.load(path)` "
                "returns to `model.load_state_dict`."
            )
        value = args[1] if len(args) > 1 else kwargs["src"]
        self._taken[name] = (whole, value if value.shape == target.shape else value.expand(target.shape))
        return target


_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


def _place(tensor: Tensor) -> int:
    """Return what is equal for tensors that share memory."""
    with torch._C.DisableTorchFunction():
        try:
            return int(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return id(tensor)  # a subclass without memory of its own
