"""The suite that every precision passes, for every mode."""

from __future__ import annotations

import pytest
import torch

from nucleate.precision import Precision
from nucleate.testing import PrecisionSuite
from nucleate_bitsandbytes import BitsandbytesPrecision


class Quantizing(PrecisionSuite):
    updates = 0.97
    quantizes = True
    mode: str
    compute_dtype: torch.dtype = torch.bfloat16

    def make_precision(self) -> Precision:
        return BitsandbytesPrecision(self.mode, compute_dtype=self.compute_dtype)


class TestNF4(Quantizing):
    mode = "nf4"


class TestNF4DoubleQuant(Quantizing):
    mode = "nf4-dq"
    compute_dtype = torch.float32


class TestFP4(Quantizing):
    mode = "fp4"
    compute_dtype = torch.float32


class TestFP4DoubleQuant(Quantizing):
    mode = "fp4-dq"


class TestInt8(Quantizing):
    mode = "int8"


class TestInt8Training(Quantizing):
    quantizes = False
    mode = "int8-training"


@pytest.mark.parametrize("mode", ["nf4", "nf4-dq", "fp4", "fp4-dq", "int8", "int8-training"])
def test_a_name_stands_for_a_mode(mode: str) -> None:
    precision = BitsandbytesPrecision.from_name(f"bnb-{mode}")
    assert (precision.name, precision.mode, precision.dtype) == (f"bnb-{mode}", mode, torch.bfloat16)
