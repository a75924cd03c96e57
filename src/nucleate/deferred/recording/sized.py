"""Results whose shapes follow from numbers among the arguments: of factories, and of joins and repeats of tensors.

The first of torch's own meta kernels for most of these operations imports torch's symbolic shapes, which takes a third
of a second. Some also import torch's compiler, which takes another third.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nucleate.deferred.recording.miniatures import result_on_miniatures

aten = torch.ops.aten

#: Factories that make at most this many numbers run for real, to find their result.
LIMIT_NUMEL = 1 << 20

# Random factories, and the position of the size among their arguments.
_RANDOM = {
    aten.randn.default: 0, aten.randn.generator: 0, aten.normal.float_float: 2, aten.randint.default: 1,
    aten.randint.generator: 1, aten.randint.low: 2, aten.randint.low_generator: 2,
}  # fmt: skip
_RANDOM_LIKE = {aten.rand_like.default, aten.randn_like.default}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def result_of_sizes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
    """Return an operation's result as meta tensors, or None if it is not known here.

    Args:
        func: The aten overload.
        args: Its positional arguments; plain tensors on any device.
        kwargs: Its keyword arguments.
        given: The tensors among both.

    Raises:
        Exception: The operation's error for such arguments.
    """
    if func in _RANDOM:
        return _random(func, args, kwargs)
    if func in _RANDOM_LIKE:
        dtype = kwargs.get("dtype") or given[0].dtype
        return result_on_miniatures(aten.empty_like.default, args, kwargs, given) if dtype in _FLOATS else None
    packet = func.overloadpacket
    if packet is aten.eye:
        return _eye(func, args, kwargs)
    if not given and (count := _COUNTS.get(packet)) is not None and 0 <= count(*args) <= LIMIT_NUMEL:
        made: Tensor = func(*args, **{**kwargs, "device": torch.device("cpu")})
        return torch.empty_like(made, device="meta")
    if packet in _JOINS and "out" not in kwargs:
        shape = _JOINS[packet](*args, **kwargs)
        return None if shape is None else torch.empty(shape, dtype=given[0].dtype, device="meta")
    return _topk(*args, **kwargs) if func is aten.topk.default else None


def _random(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the result of a random factory on meta. Drawing one number shows whether it takes its arguments."""
    place = _RANDOM[func]
    options = {name: value for name, value in kwargs.items() if name != "device"}
    one = (*args[:place], [1], *args[place + 1 :])
    first = func.overloadpacket(*one, **{**options, "generator": torch.Generator()})
    return torch.empty(args[place], dtype=first.dtype, device="meta") if first.layout == torch.strided else None


def _eye(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    num_rows, num_cols = args if len(args) == 2 else (*args, *args)
    if num_rows < 0 or num_cols < 0:
        return None
    out: Tensor | None = kwargs.get("out")
    if out is not None:
        return out if tuple(out.size()) == (num_rows, num_cols) else None
    first = torch.eye(1, dtype=kwargs.get("dtype"), layout=kwargs.get("layout") or torch.strided)
    made = torch.empty(num_rows, num_cols, dtype=first.dtype, device="meta")
    return made if first.layout == torch.strided else None


def _topk(tensor: Tensor, count: int, dim: int = -1, *order: bool) -> tuple[Tensor, Tensor] | None:
    if not tensor.dim() or not -tensor.dim() <= dim < tensor.dim() or not 0 <= count <= tensor.size(dim):
        return None
    shape = list(tensor.size())
    shape[dim] = count
    return tuple(torch.empty(shape, dtype=dtype, device="meta") for dtype in (tensor.dtype, torch.int64))  # type: ignore[return-value]


def _range_numel(*numbers: Any) -> float:
    start, end, step = (*numbers, 1) if len(numbers) == 2 else (0, *numbers, 1) if len(numbers) == 1 else numbers
    plain = all(isinstance(number, (int, float)) and math.isfinite(number) for number in (start, end, step))
    return abs((end - start) / step) if plain and step else -1


def _counted(start: Any, end: Any, count: Any, *rest: Any) -> int:
    return count if isinstance(count, int) else -1


def _long(count: Any, *rest: Any) -> int:
    return count if isinstance(count, int) else -1


def _triangle(num_rows: int, num_cols: int, *offset: int) -> int:
    return num_rows * num_cols


# The most numbers that these factories make, or -1 if their arguments do not tell.
_COUNTS: dict[Any, Callable[..., float]] = {
    aten.arange: _range_numel,
    aten.linspace: _counted,
    aten.logspace: _counted,
    aten.tril_indices: _triangle,
    aten.triu_indices: _triangle,
    aten.hann_window: _long,
    aten.hamming_window: _long,
    aten.blackman_window: _long,
    aten.bartlett_window: _long,
    aten.kaiser_window: _long,
}


def _joined(tensors: list[Tensor], dim: int = 0) -> list[int] | None:
    """Return the shape of `cat`, or None if the memory format or an error needs a closer look."""
    shapes = [list(tensor.size()) for tensor in tensors]
    if not _are_alike(tensors, len(shapes[0])) or not -len(shapes[0]) <= dim < len(shapes[0]):
        return None
    length = sum(shape[dim] for shape in shapes)
    for shape in shapes:
        shape[dim] = length
    return shapes[0] if all(shape == shapes[0] for shape in shapes) else None


def _stacked(tensors: list[Tensor], dim: int = 0) -> list[int] | None:
    shape = list(tensors[0].size())
    if not _are_alike(tensors, len(shape) + 1) or any(list(tensor.size()) != shape for tensor in tensors):
        return None
    if not -len(shape) - 1 <= dim <= len(shape):
        return None
    place = dim if dim >= 0 else len(shape) + 1 + dim
    return [*shape[:place], len(tensors), *shape[place:]]


def _repeated(tensor: Tensor, repeats: list[int]) -> list[int] | None:
    missing = len(repeats) - tensor.dim()
    if missing < 0 or any(number < 1 for number in repeats) or not tensor.numel():
        return None
    return [number * length for number, length in zip(repeats, [1] * missing + list(tensor.size()), strict=True)]


def _diagonal(tensor: Tensor, offset: int = 0, dim1: int = -2, dim2: int = -1) -> list[int] | None:
    if not tensor.dim() or (dim1, dim2) != (-2, -1):
        return None
    length = tensor.size(-1) + abs(offset)
    return [*tensor.size()[:-1], length, length]


def _are_alike(tensors: list[Tensor], num_dims: int) -> bool:
    """Return whether tensors can be joined without a look at their memory formats.

    Args:
        tensors: They must have elements, one dtype and one number of dims.
        num_dims: How many dims the result has. Images and volumes have formats, unless all strides are the default.
    """
    first = tensors[0]
    return all(
        tensor.numel()
        and tensor.dtype == first.dtype
        and tensor.dim() == first.dim()
        and (num_dims not in (4, 5) or _is_by_default(tensor))
        for tensor in tensors
    )


def _is_by_default(tensor: Tensor) -> bool:
    """Return whether all strides are the default, even those of dims of one element, which may look like formats."""
    end = 1
    for length, stride in zip(reversed(tensor.size()), reversed(tensor.stride()), strict=True):
        if stride != end:
            return False
        end *= length
    return True


_JOINS: dict[Any, Callable[..., list[int] | None]] = {
    aten.cat: _joined,
    aten.stack: _stacked,
    aten.repeat: _repeated,
    aten.diag_embed: _diagonal,
}
