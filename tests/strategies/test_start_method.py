"""The way in which processes start: by a strategy's keyword, or by a name that scripts for Lightning Fabric use."""

from __future__ import annotations

import pytest

from nucleate import Runtime
from nucleate.errors import ConfigurationError, UsageError
from nucleate.registry import STRATEGIES
from nucleate.strategies import DDPStrategy, FSDPStrategy


@pytest.mark.parametrize(
    ("name", "method"),
    [("ddp", None), ("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork"), ("fsdp", None)],
)
def test_a_name_chooses_a_start_method(name: str, method: str | None) -> None:
    strategy = STRATEGIES.create(name)
    assert isinstance(strategy, DDPStrategy | FSDPStrategy)
    assert (strategy.name, strategy.start_method) == (name, method)


@pytest.mark.parametrize("cls", [DDPStrategy, FSDPStrategy])
def test_an_unknown_start_method_is_refused(cls: type[DDPStrategy] | type[FSDPStrategy]) -> None:
    assert cls(start_method="popen").start_method == "popen"
    with pytest.raises(ConfigurationError, match="start_method='threads' is not a start method.*'forkserver'"):
        cls(start_method="threads")


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork"])
def test_a_start_method_for_functions_needs_one(name: str) -> None:
    runtime = Runtime(accelerator="cpu", devices=2, strategy=name)
    with pytest.raises(UsageError, match=r"`launch` got no function. Call runtime.launch\(main\)"):
        runtime.launch()


def test_a_runtime_that_has_yet_to_start_its_ranks_shows_the_place_of_rank_0() -> None:
    runtime = Runtime(accelerator="cpu", devices="0,1")
    assert (runtime.world_size, runtime.global_rank, runtime.local_rank) == (2, 0, 0)
    assert runtime.strategy.name == "ddp"
    assert str(runtime) == "Runtime(cpu, ddp x 2, no-cast)"


def test_what_cannot_be_sent_to_a_new_process_is_refused_before_one_starts() -> None:
    runtime = Runtime(accelerator="cpu", devices=2, strategy="ddp_spawn")
    with pytest.raises(UsageError, match="cannot be pickled.*top level of a module"):
        runtime.launch(lambda runtime: None)
