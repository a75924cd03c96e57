"""Deferred models under the data-parallel training of Hugging Face's libraries, on two ranks."""

from __future__ import annotations

from pathlib import Path

from tests.device import cpu_only
from tests.multi.ranks import run_ranks

pytestmark = cpu_only("the libraries choose the device")


def test_a_deferred_model_is_refused_and_a_materialized_one_trains_as_an_eager_one_does(tmp_path: Path) -> None:
    output = run_ranks("tests.multi.scripts.trainers", 2, tmp_path, timeout=250).stdout
    assert [output.count(f"{way}: kept") for way in ("by_accelerate", "by_trainer")] == [2, 2]
