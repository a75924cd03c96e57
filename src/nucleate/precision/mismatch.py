"""Explanations of dtype mismatches in forward: the tensors of a model that a precision leaves in another dtype."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from nucleate.errors import DtypeMismatchError, NucleateError, name_list
from nucleate.precision.casting import FLOATING
from nucleate.precision.fixed_dtype import FixedDtype

# The names of dtypes in messages of torch: BFloat16, c10::Half, torch.FloatTensor, CPUDoubleType, torch.float32.
# `floating` and `Float8_e4m3fn` are other words.
_DTYPE = re.compile(r"(bfloat16|float16|float32|float64|half|double|float(?!\d|ing))", re.IGNORECASE)
_DTYPES = {
    "bfloat16": torch.bfloat16,
    **dict.fromkeys(("float16", "half"), torch.float16),
    **dict.fromkeys(("float32", "float"), torch.float32),
    **dict.fromkeys(("float64", "double"), torch.float64),
}
# Messages of torch about two dtypes that name at most one (torch 2.13).
_UNNAMED = re.compile(r"\b(mixed dtype|same (d?type|scalar type)s?|different dtypes|dtype to be equal to src\.dtype)\b")


def explain_mismatch(
    error: Exception, model: nn.Module, name: str, dtypes: Sequence[torch.dtype]
) -> DtypeMismatchError | None:
    """Return an error that names the tensors which may have caused a dtype mismatch in forward.

    Args:
        error: The error that forward raised.
        model: The model.
        name: The precision's name.
        dtypes: The dtypes that the precision computes in.

    Returns:
        The explanation. None if the error is not about two floating point dtypes, or if the model has no buffer that
        can be the reason.
    """
    message = str(error)
    named = {_DTYPES[word.lower()] for word in _DTYPE.findall(message)}
    if isinstance(error, NucleateError) or not (len(named) > 1 or _UNNAMED.search(message)):
        return None
    kept = [(fqn, tensor) for fqn, tensor in _kept(model, dtypes) if len(named) < 2 or tensor.dtype in named]
    if not kept:
        return None
    first = kept[0][0].rpartition(".")[2]
    computed = " or ".join(map(str, dtypes))
    return DtypeMismatchError(
        f"forward met two dtypes ({message.strip().splitlines()[0].rstrip('.')}). "
        f"Precision {name!r} computes in {computed} and does not cast buffers. These tensors of "
        f"{type(model).__name__} have another dtype: "
        f"{name_list(f'{fqn} ({tensor.dtype})' for fqn, tensor in kept)}. "
        f"If forward combines one of them with hidden states, cast it there, `self.{first}.to(x.dtype)`, or register "
        f"it in {dtypes[0]}: pass `dtype=`, or construct the model inside `init_module` without a dtype. A tensor that "
        "forward itself makes needs `dtype=x.dtype`."
    )


def _kept(model: nn.Module, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers and tensor attributes of other floating point dtypes, by FQN."""
    for prefix, module in model.named_modules():
        if isinstance(module, (FixedDtype, _NormBase)):
            # Their dtypes belong to their format or to their kernels.
            continue
        for name, tensor in (*module._buffers.items(), *vars(module).items()):
            if isinstance(tensor, Tensor) and tensor.dtype in FLOATING and tensor.dtype not in dtypes:
                yield f"{prefix}.{name}" if prefix else name, tensor
