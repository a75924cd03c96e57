"""Contexts in several threads: each records for itself, and they take turns at what they share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred, eager, handle_of, is_recording
from nucleate.deferred.replay.replayer import Replayer
from nucleate.errors import DeferredUseError
from nucleate.materialize import materialize
from tests.deferred.equality import assert_exact, assert_same_model
from tests.deferred.test_context import Failing, torch_state


def test_an_error_in_a_thread_leaves_that_and_other_threads_as_they_were() -> None:
    before, survivors = torch_state(), []

    def construct() -> None:
        with suppress(ZeroDivisionError), deferred():
            Failing(ZeroDivisionError(), survivors)

    torch.manual_seed(0)
    with deferred():
        first = nn.Linear(30, 30)
        thread = threading.Thread(target=construct)
        thread.start()
        thread.join()
        second = nn.Linear(30, 30)
        nn.init.trunc_normal_(second.weight)
    stream = torch.rand(3)
    assert torch_state() == before
    torch.manual_seed(0)
    expected = [nn.Linear(30, 30)]
    with suppress(ZeroDivisionError):
        Failing(ZeroDivisionError(), expected)
    expected.append(nn.Linear(30, 30))
    nn.init.trunc_normal_(expected[2].weight)
    assert torch.equal(torch.rand(3), stream)
    for eager_model, model in zip(expected, (first, survivors[0], second), strict=True):
        assert_same_model(eager_model, materialize(model))


def test_a_context_in_a_thread_leaves_other_threads_alone() -> None:
    made: list[nn.Module] = []
    begin, begun, end = (threading.Event() for _ in range(3))

    def construct() -> None:
        begin.wait(10)
        assert not is_recording()
        made.append(nn.Linear(3, 3))
        begun.set()
        end.wait(10)

    thread = threading.Thread(target=construct)
    thread.start()
    with deferred():
        begin.set()
        begun.wait(10)
        model = nn.Linear(3, 3)
    end.set()
    thread.join()
    assert made[0](torch.ones(1, 3)).isfinite().all()
    assert materialize(model)(torch.ones(1, 3)).isfinite().all()


def test_threads_that_a_constructor_starts_are_part_of_it() -> None:
    def make() -> nn.Module:
        layers = [nn.Linear(20, 20) for _ in range(6)]
        with ThreadPoolExecutor(1) as executor:
            layers += executor.map(lambda index: nn.Linear(20, index), range(1, 5))
        with ThreadPoolExecutor(3) as executor:
            list(executor.map(lambda layer: nn.init.constant_(layer.weight, layer.bias.max().item()), layers))
        noise: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: noise.append(torch.randn(300)))
        thread.start()
        thread.join()
        model = nn.Sequential(*layers)
        model.register_buffer("noise", noise[0])
        model.last = nn.Linear(20, 20)
        return model

    assert_exact(make)


def test_a_thread_that_helps_a_replay_is_no_part_of_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    run = Replayer._run

    def with_help(replayer: Replayer, *args: Any, **kwargs: Any) -> Any:
        thread = threading.Thread(target=lambda: seen.append(is_recording() or torch.empty(3).is_meta))
        thread.start()
        thread.join(10)
        return run(replayer, *args, **kwargs)

    monkeypatch.setattr(Replayer, "_run", with_help)
    with deferred():
        weight = torch.randn(3, 3)
        assert weight.max().item() == max(weight.flatten().tolist())
    assert seen
    assert not any(seen)


def test_what_a_thread_starts_inside_eager_is_real() -> None:
    made: list[nn.Module] = []
    with deferred():
        with eager():
            thread = threading.Thread(target=lambda: made.append(nn.Linear(3, 3)))
            thread.start()
            thread.join()
        assert made[0](torch.ones(1, 3)).isfinite().all()


def test_a_thread_that_outlives_the_context_goes_on_unrecorded() -> None:
    begun, ended, made = threading.Event(), threading.Event(), []

    def work() -> None:
        assert is_recording()
        begun.set()
        assert ended.wait(30)
        assert not is_recording()
        made.append(nn.Linear(3, 3))
        made.append(torch.rand(3))

    with deferred():
        model = nn.Linear(3, 3)
        thread = threading.Thread(target=work)
        thread.start()
        # A thread that is slow to start would find the context ended.
        assert begun.wait(30)
    state = torch.get_rng_state()
    ended.set()
    thread.join()
    torch.set_rng_state(state)
    assert_same_model(nn.Linear(3, 3), made[0])
    assert torch.equal(torch.rand(3), made[1])
    assert materialize(model.half()).weight.dtype == torch.float16


def test_contexts_that_begin_and_end_crosswise_in_threads_leave_torch_as_it_was() -> None:
    before = torch_state()
    begun, end = threading.Event(), threading.Event()

    def construct() -> None:
        with deferred():
            begun.set()
            end.wait(10)
            made.append(nn.Linear(3, 3))
            nn.init.trunc_normal_(made[0].weight)
            made[0].bias.data.copy_(outer.bias)

    made: list[nn.Module] = []
    thread = threading.Thread(target=construct)
    with deferred():
        outer = nn.Linear(3, 3)
        thread.start()
        begun.wait(10)
    end.set()
    thread.join()
    assert torch_state() == before
    assert handle_of(made[0].weight) is not None
    assert torch.equal(materialize(made[0]).bias, materialize(outer).bias)


def test_threads_that_construct_at_once_from_their_own_generators_get_eager_values() -> None:
    def make(seed: int) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(*(nn.Linear(20, 20, device="cpu") for _ in range(10)))
        for parameter in model.parameters():
            nn.init.normal_(parameter, generator=generator)
            parameter.data.div_(parameter.data.std().item())
        return model

    models: dict[int, nn.Module] = {}

    def construct(seed: int) -> None:
        with deferred():
            models[seed] = make(seed)
        materialize(models[seed])

    threads = [threading.Thread(target=construct, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_same_model(make(seed), models[seed])


def test_threads_that_construct_at_once_from_one_generator_share_its_stream() -> None:
    def numbers() -> list[torch.Tensor]:
        return [torch.rand(16) for _ in range(50)]

    torch.manual_seed(0)
    expected = [tuple(torch.rand(16).tolist()) for _ in range(150)]
    stream = torch.rand(3)
    models = [nn.Module() for _ in range(3)]
    barrier = threading.Barrier(3)

    def construct(model: nn.Module) -> None:
        barrier.wait(10)
        with deferred():
            model.numbers = numbers()

    torch.manual_seed(0)
    threads = [threading.Thread(target=construct, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.rand(3), stream)
    # In which order the threads take their turns is open, as in eager construction; every number is taken once.
    taken = [tuple(number.tolist()) for model in models for number in materialize(model).numbers]
    assert sorted(taken) == sorted(expected)


def test_a_model_that_another_thread_is_editing_is_refused() -> None:
    with deferred():
        model = nn.Linear(3, 3)
    editing, done = threading.Event(), threading.Event()

    def edit() -> None:
        with deferred():
            model.weight.data.zero_()
            editing.set()
            done.wait(10)

    thread = threading.Thread(target=edit)
    thread.start()
    editing.wait(10)
    with pytest.raises(DeferredUseError, match="another thread"):
        model.bias.data.clone()
    with pytest.raises(DeferredUseError, match="another thread"), deferred():
        model.bias.data.zero_()
    done.set()
    thread.join()
    materialize(model)
    assert torch.equal(model.weight, torch.zeros(3, 3))
