"""Every built-in precision passes the suite that plugins inherit."""

import torch

from nucleate.precision import FullPrecision, HalfPrecision, MixedPrecision, NoCastPrecision, Precision
from nucleate.testing import PrecisionSuite, TinyRecurrent
from tests.device import ACCELERATOR, lstm_runs_in


class TestNoCast(PrecisionSuite):
    accelerator = ACCELERATOR

    def make_precision(self) -> Precision:
        return NoCastPrecision.from_name("no-cast")


class Test32True(PrecisionSuite):
    accelerator = ACCELERATOR

    def make_precision(self) -> Precision:
        return FullPrecision.from_name("32-true")


class Test64True(PrecisionSuite):
    accelerator = ACCELERATOR

    def make_precision(self) -> Precision:
        return FullPrecision.from_name("64-true")


class TestBF16True(PrecisionSuite):
    accelerator = ACCELERATOR

    def make_precision(self) -> Precision:
        return HalfPrecision.from_name("bf16-true")


class Test16True(PrecisionSuite):
    accelerator = ACCELERATOR

    def make_precision(self) -> Precision:
        return HalfPrecision.from_name("16-true")


class TestBF16Mixed(PrecisionSuite):
    accelerator = ACCELERATOR

    cannot_run = () if lstm_runs_in(torch.bfloat16) else (TinyRecurrent,)

    def make_precision(self) -> Precision:
        return MixedPrecision.from_name("bf16-mixed")


class Test16Mixed(PrecisionSuite):
    accelerator = ACCELERATOR

    cannot_run = () if lstm_runs_in(torch.float16) else (TinyRecurrent,)

    def make_precision(self) -> Precision:
        return MixedPrecision.from_name("16-mixed")
