"""Eager and deferred construction of one model, compared bit for bit, with everything that the model holds."""

from __future__ import annotations

import random
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nucleate.deferred import deferred
from nucleate.devices import default_generator
from nucleate.materialize import materialize
from tests.device import ACCELERATOR, ON_CPU, device, on_device

# What no tensor is looked for in; modules are visited by themselves.
_CLOSED = (
    str, bytes, int, float, complex, type(None), type, Enum, nn.Module, types.ModuleType, torch.dtype, torch.device,
    torch.Generator, torch.UntypedStorage, np.ndarray,
)  # fmt: skip


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def named_attributes(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that modules hold elsewhere: as attributes, in collections, in objects, in closures.

    On purpose not the search that the package itself uses, which might overlook something.
    """
    seen: set[int] = set()
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                found.update(_reached(value, f"{prefix}.{name}" if prefix else name, seen))
    return found


def _reached(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, _CLOSED) or id(value) in seen:
        return
    seen.add(id(value))
    for step, item in _items(value):
        yield from _reached(item, path + step, seen)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        # Hooks are numbered through the whole process.
        places = (index if isinstance(key, int) else key for index, key in enumerate(list(value)))
        yield from ((f"[{place!r}]", item) for place, item in zip(places, list(value.values()), strict=True))
    elif isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "deque":
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, weakref.ref):
        yield "()", value()
    elif isinstance(value, types.FunctionType):
        yield from ((f".closure{index}", cell.cell_contents) for index, cell in enumerate(_filled_cells(value)))
    elif isinstance(value, types.MethodType):
        yield ".self", value.__self__
    elif isinstance(value, partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    else:
        yield from ((f".{name}", item) for name, item in list(getattr(value, "__dict__", {}).items()))


def _filled_cells(function: types.FunctionType) -> Iterator[types.CellType]:
    for cell in function.__closure__ or ():
        try:
            cell.cell_contents  # noqa: B018
        except ValueError:
            continue
        yield cell


def bits(tensor: Tensor) -> bytes:
    """Return the content of a tensor as bytes, so that NaN equals NaN and -0.0 differs from 0.0."""
    flat = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).cpu().numpy().tobytes() if flat.numel() else b""


def differences(eager: nn.Module, other: nn.Module) -> Iterator[str]:
    """Yield how two models differ: values, dtypes, strides, classes, requires_grad, ties and shared storages."""
    expected, actual = named_tensors(eager), named_tensors(other)
    yield from _differences(expected, actual, ("requires_grad", "is_leaf"))
    # A computed attribute has its value, but not the graph that led to it (docs/concepts/deferred.md).
    held, twins = named_attributes(eager), named_attributes(other)
    yield from _differences(held, twins, ())
    expected, actual = {**expected, **held}, {**actual, **twins}
    if expected.keys() != actual.keys():
        return
    for what, key in (("is the same tensor as", id), ("shares memory with", _storage_key)):
        first, second = _first_of_each(expected, key), _first_of_each(actual, key)
        for name in expected:
            if first[name] != second[name]:
                yield f"{name} {what} {second[name]}, eagerly {first[name]}"


def _differences(expected: dict[str, Tensor], actual: dict[str, Tensor], qualities: tuple[str, ...]) -> Iterator[str]:
    if expected.keys() != actual.keys():
        yield f"other names: {sorted(expected.keys() ^ actual.keys())[:10]}"
    for name in expected.keys() & actual.keys():
        tensor, twin = expected[name], actual[name]
        if type(tensor) is not type(twin):
            yield f"{name}: class {type(twin).__name__}, eagerly {type(tensor).__name__}"
            continue
        # A lazy parameter has no shape yet.
        shape = () if is_lazy(tensor) else ("shape",)
        for quality in ("layout", "dtype", *shape, "device", *qualities):
            ours, theirs = getattr(twin, quality), getattr(tensor, quality)
            if ours != theirs:
                yield f"{name}: {quality} {ours}, eagerly {theirs}"
                break
        else:
            yield from _other_content(name, tensor, twin)


def _other_content(name: str, tensor: Tensor, twin: Tensor) -> Iterator[str]:
    if is_lazy(tensor) or tensor.is_meta:
        return
    if tensor.layout != torch.strided:
        if not torch.equal(tensor.to_dense(), twin.to_dense()):
            yield f"{name}: other values"
        return
    # Without elements strides lead nowhere, and kernels of the meta device give others.
    if tensor.numel() and tensor.stride() != twin.stride():
        yield f"{name}: stride {twin.stride()}, eagerly {tensor.stride()}"
    if tensor.storage_offset() != twin.storage_offset():
        yield f"{name}: storage offset {twin.storage_offset()}, eagerly {tensor.storage_offset()}"
    if bits(tensor) != bits(twin):
        yield f"{name}: other values"


def _first_of_each(tensors: dict[str, Tensor], key: Callable[[Tensor], int]) -> dict[str, str]:
    """Return for each name the first one whose tensor has the same key: equal maps, equal partitions."""
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(key(tensor), name) for name, tensor in tensors.items()}


def _storage_key(tensor: Tensor) -> int:
    is_plain = tensor.layout == torch.strided and not is_lazy(tensor)
    return tensor.untyped_storage()._cdata if is_plain else id(tensor)


def assert_same_model(eager: nn.Module, other: nn.Module) -> None:
    """Compare two models; see `differences`."""
    found = list(differences(eager, other))
    assert not found, "\n".join(found[:10])


def seed_everything(seed: int) -> None:
    """Seed the streams that constructors draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def streams() -> tuple[Any, ...]:
    """Return where the random streams of torch, Python and NumPy stand."""
    name, keys, *rest = np.random.get_state()
    torch_states = {bits(generator.get_state()) for generator in (torch.default_generator, default_generator(device()))}
    return torch_states, random.getstate(), (name, keys.tobytes(), *rest)


def construct_both(make: Callable[[], nn.Module], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Return the model made eagerly and the same model deferred and materialized, with equal streams asserted.

    Where the device of the tests cannot make it eagerly, as where it needs NumPy, deferred construction must fail too.
    """
    seed_everything(seed)
    try:
        with on_device():
            eager = make()
    except Exception as error:
        if ON_CPU:
            raise
        with pytest.raises(Exception):  # noqa: B017, PT011 - another operation may be the first to fail
            _construct_deferred(make, seed)
        pytest.skip(f"eager torch fails on {ACCELERATOR} as well: {type(error).__name__}: {str(error)[:200]}")
    after_eager = streams()
    seed_everything(seed)
    with on_device(), deferred(device()):
        model = make()
    assert streams() == after_eager, "construction left a random stream elsewhere"
    materialize(model, device())
    assert streams() == after_eager, "materialization moved a random stream"
    return eager, model


def _construct_deferred(make: Callable[[], nn.Module], seed: int) -> None:
    seed_everything(seed)
    with on_device(), deferred(device()):
        model = make()
    materialize(model, device())


def assert_exact(make: Callable[[], nn.Module]) -> nn.Module:
    """Assert that deferred construction equals eager construction, and return the materialized model."""
    eager, model = construct_both(make)
    assert_same_model(eager, model)
    return model
