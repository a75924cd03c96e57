"""The garbage collector is off inside the context, and afterwards as it was."""

from __future__ import annotations

import gc

import pytest

from nucleate.garbage import uncollected


def test_collection_is_off_inside_and_on_again_after_an_error() -> None:
    assert gc.isenabled()
    was_enabled: list[bool] = []

    def fail() -> None:
        with uncollected():
            was_enabled.append(gc.isenabled())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert was_enabled == [False]
    assert gc.isenabled()


def test_collection_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
