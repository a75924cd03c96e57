"""torch as if nobody had changed its modes: for what nucleate computes for itself while something is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def plain_modes() -> Iterator[None]:
    """Leave modes, autocast and autograd for as long as this is open, in this thread."""
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch._C._DisableAutocast(), torch.no_grad():
        yield
