"""Plain modes of torch, for nucleate's own computations while a recording is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes

from nucleate.deferred.inference_mode import outside_inference_mode


@contextmanager
def plain_modes() -> Iterator[None]:
    """Turn modes, inference mode included, autocast and autograd off in this thread while this context is open."""
    with (
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        outside_inference_mode(),
        torch._C._DisableAutocast(),
        torch.no_grad(),
    ):
        yield
