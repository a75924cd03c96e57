"""Inference mode and no_grad around construction, setup, saving and loading on several ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.multi.ranks import fork_ranks


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_models_of_other_modes_are_those_of_no_mode(strategy: str) -> None:
    done = fork_ranks(Path(__file__).parent / "scripts" / "inference_mode.py", 2, strategy)
    assert done.stdout.count("every mode gives one model") == 1
