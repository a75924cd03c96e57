"""The callback on one device: a deferred model trains as the eager one does, wherever its layers are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from tiny import Module, assert_same, data, make, trainer

from nucleate import Runtime
from nucleate.deferred import deferred, handle_of
from nucleate.errors import DeferredUseError
from nucleate.materialize import Plan
from nucleate_lightning import Materialize

PLACES = ["init", "setup", "configure_model"]


def eager_and_deferred(where: str) -> tuple[Module, Module]:
    return make(where, nullcontext), make(where, deferred)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_it_trains_as_an_eager_model_does(where: str, precision: Any) -> None:
    models, streams = [], []
    for context in (nullcontext, deferred):
        model = make(where, context)
        trainer(precision=precision, callbacks=[Materialize()]).fit(model, data())
        models.append(model)
        streams.append(torch.get_rng_state())
    eager, ours = models
    assert_same(ours.first, eager.first)
    assert_same(ours.state_dict(), eager.state_dict())
    assert torch.equal(*streams)
    assert ours.net[4].weight is ours.net[3].weight
    assert not torch.equal(ours.first["net.0.weight"], ours.net[0].weight)
    assert ours.trainer is not None


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_it_serves_every_function_of_the_trainer(where: str, function: str) -> None:
    results = []
    for context in (nullcontext, deferred):
        model = make(where, context)
        results.append(getattr(trainer(callbacks=[Materialize()]), function)(model, data()))
        results.append(model.first)
    assert_same(results[3], results[1])
    assert str(results[2]) == str(results[0])


def test_without_the_callback_the_error_says_to_add_it() -> None:
    with pytest.raises(DeferredUseError, match=r"net.0.weight is deferred .*nucleate_lightning.Materialize\(\)"):
        trainer().fit(make("init", deferred), data())


@pytest.mark.parametrize("where", PLACES)
def test_a_checkpoint_resumes_into_a_deferred_model(where: str, tmp_path: Path) -> None:
    whole = trainer(callbacks=[Materialize()], max_epochs=3)
    model = make(where, deferred)
    whole.fit(model, data())

    begun, first = trainer(callbacks=[Materialize()], max_epochs=1), make(where, deferred)
    begun.fit(first, data())
    begun.save_checkpoint(tmp_path / "last.ckpt")
    resumed = make(where, deferred)
    trainer(callbacks=[Materialize()], max_epochs=3).fit(resumed, data(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(resumed.first, first.state_dict())
    assert_same(resumed.state_dict(), model.state_dict())


@contextmanager
def under_runtime() -> Iterator[None]:
    with Runtime(accelerator="cpu").init_module(empty_init=True):
        yield


@contextmanager
def under_trainer() -> Iterator[None]:
    # Lightning skips the functions of `nn.init` here.
    with trainer().init_module(empty_init=True), deferred():
        yield


@pytest.mark.parametrize("context", [deferred, under_runtime, under_trainer])
@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_load_from_checkpoint_makes_a_deferred_model_with_the_values_of_the_file(
    context: Any, where: str, tmp_path: Path
) -> None:
    begun, model = trainer(callbacks=[Materialize()]), make(where, nullcontext)
    begun.fit(model, data())
    begun.save_checkpoint(tmp_path / "last.ckpt")
    with context():
        again = Module.load_from_checkpoint(tmp_path / "last.ckpt", where=where, context=nullcontext)
    assert handle_of(again.net[0].weight) is not None
    assert "checkpoint" in Plan.of(again).origins()["net.0.weight"]
    trainer(callbacks=[Materialize()]).fit(again, data())
    assert_same(again.first, model.state_dict())


def test_one_trainer_runs_several_functions_and_models() -> None:
    one = trainer(callbacks=[Materialize()])
    model = make("configure_model", deferred)
    one.fit(model, data())
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one.test(model, data())
    assert_same(model.state_dict(), trained)
    one.predict(make("setup", deferred), data())
    assert "setup" not in vars(one.strategy)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("averaging", [lambda: WeightAveraging(), lambda: StochasticWeightAveraging(0.01, 1)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_copies_that_other_callbacks_keep_have_values_too(order: int, averaging: Any) -> None:
    models = []
    for context in (nullcontext, deferred):
        model = make("init", context)
        trainer(callbacks=[Materialize(), averaging()][::order]).fit(model, data())
        models.append(model.state_dict())
    assert_same(models[1], models[0])


class Failing(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise RuntimeError("stop")


def test_after_an_error_the_strategy_is_as_before() -> None:
    one = trainer(callbacks=[Materialize(), Failing()])
    with pytest.raises(RuntimeError, match="stop"):
        one.fit(make("init", deferred), data())
    assert "setup" not in vars(one.strategy)


def test_a_model_without_deferred_tensors_is_left_alone() -> None:
    model = make("init", nullcontext)
    with torch.device("meta"):
        model.shape_only = torch.nn.Linear(2, 2)
    with pytest.raises(NotImplementedError, match="meta"):
        trainer(callbacks=[Materialize()]).fit(model, data())


def test_two_of_them_do_as_one() -> None:
    eager, ours = eager_and_deferred("configure_model")
    trainer(callbacks=[Materialize(), Materialize()]).fit(ours, data())
    torch.manual_seed(0)
    eager = make("configure_model", nullcontext)
    trainer().fit(eager, data())
    assert_same(ours.first, eager.first)
