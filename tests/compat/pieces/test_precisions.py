"""Fabric's precision classes make plugins of nucleate."""

from __future__ import annotations

import torch

from nucleate.compat.pieces.precisions import BitsandbytesPrecision, DoublePrecision, HalfPrecision, MixedPrecision
from nucleate.registry import PRECISIONS


def test_the_arguments_are_fabrics() -> None:
    assert HalfPrecision("bf16-true").name == "bf16-true"
    assert HalfPrecision().name == "16-true"
    assert DoublePrecision().name == "64-true"
    assert MixedPrecision("bf16-mixed", "cpu").compute_dtype == torch.bfloat16


def test_a_plugin_of_nucleate_is_an_instance() -> None:
    assert isinstance(PRECISIONS.create("bf16-true"), HalfPrecision)
    assert isinstance(PRECISIONS.create("16-mixed"), MixedPrecision)
    assert not isinstance(PRECISIONS.create("bf16-true"), MixedPrecision)
    assert not isinstance(PRECISIONS.create("bf16-true"), BitsandbytesPrecision)
