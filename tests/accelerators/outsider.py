"""An accelerator as others write it: public names only, attributes where the base has properties."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import nn

from nucleate import Accelerator


class Outsider(Accelerator):
    """Stands for any kind of device, without one."""

    backend: ClassVar[str] = "gloo"
    pins_memory: ClassVar[bool] = True

    def __init__(self, kind: str = "cpu") -> None:
        self.name = kind

    @classmethod
    def from_name(cls, name: str) -> Outsider:
        return cls()

    @classmethod
    def is_available(cls) -> bool:
        return True

    def count(self) -> int:
        return 1

    def select(self, local_rank: int) -> torch.device:
        return torch.device(self.name)

    def module_init_context(self) -> AbstractContextManager[object]:
        return nullcontext()

    def setup(self, model: nn.Module) -> nn.Module:
        return model
