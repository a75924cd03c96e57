"""The reader suites, with checkpoints that were written from tensors of a device, under that default device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint.readers import test_conformance as suites


class OnDevice:
    """Comes before a suite: tensors lie on the second device when they are written."""

    num_damages = 20

    @pytest.fixture(autouse=True)
    def factories_make_tensors_there(self, sim: object) -> Iterator[None]:
        with torch.device("sim:1"):
            yield

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        there = {name: tensor.to("sim:1") for name, tensor in tensors.items()}
        # torch.distributed.checkpoint waits for the copies of the current device only (torch 2.13).
        with torch.accelerator.device_index(1):
            super().write(path, there)  # type: ignore[misc]


class TestSafetensorsFile(OnDevice, suites.TestSafetensorsFile):
    pass


class TestTorchFile(OnDevice, suites.TestTorchFile):
    pass


class TestLegacyTorchFile(OnDevice, suites.TestLegacyTorchFile):
    pass


class TestDCP(OnDevice, suites.TestDCP):
    pass


del suites
