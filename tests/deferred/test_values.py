"""What constructors read is remembered: chains of reads are linear, memory is bounded, nothing stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nucleate.deferred import deferred
from nucleate.deferred.recording.known_values import KnownValues
from nucleate.deferred.replay.replayer import Replayer
from nucleate.deferred.tape.steps import Step
from nucleate.materialize import materialize


def _chain(length: int) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(50, 50))
    with torch.no_grad():
        for _ in range(length):
            weight.mul_(1 / weight.std().item())
            weight.add_(0.1)
    return weight


def _num_executed(length: int, monkeypatch: pytest.MonkeyPatch) -> int:
    executed: list[Step] = []
    execute = Replayer._execute

    def counted(self: Replayer, step: Step, *args: Any) -> None:
        executed.append(step)
        execute(self, step, *args)

    with monkeypatch.context() as patch, deferred():
        patch.setattr(Replayer, "_execute", counted)
        _chain(length)
    return len(executed)


def test_a_chain_of_reads_costs_as_much_as_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, four = (_num_executed(length, monkeypatch) for length in (10, 20, 40))
    assert four - two == 2 * (two - one)


def test_values_that_were_read_take_no_more_memory_than_the_limit() -> None:
    with deferred() as record:
        values = KnownValues(record.replayer, limit_bytes=3 * 4000)
        tensors = [torch.randn(1000) for _ in range(6)]
        for tensor in tensors:
            values.of(tensor)
        assert [values._current(record.tape.number(tensor)) is not None for tensor in tensors] == [False] * 3 + [
            True
        ] * 3
        first = values.of(tensors[0])
        assert values._current(record.tape.number(tensors[3])) is None
        assert torch.equal(first, values.of(tensors[0]))
        values.forget()


def test_a_value_is_read_again_after_a_write() -> None:
    with deferred():
        tensor = torch.zeros(3)
        assert tensor[0].item() == 0
        tensor[1:].fill_(2)
        assert tensor.tolist() == [0, 2, 2]
        tensor.view(-1)[0] = 5
        assert tensor.sum().item() == 9


def test_no_value_outlives_the_recording() -> None:
    with deferred() as record:
        module = nn.Linear(3, 3)
        module.weight.detach().tolist()
    assert not record.recorder._values._known
    steps = [step for index in record.tape.writers(0) if (step := record.tape.steps[index])]
    assert all(step.args for step in steps)
    torch.manual_seed(1)
    materialize(module)


def test_the_storage_of_a_large_intermediate_that_is_gone_is_not_kept() -> None:
    with deferred() as record:
        weight = torch.randn(100, 100)
        weight.abs().exp().sum().item()
        known = sum(memory.nbytes() for _, memory in record.recorder._values._known.values())
        assert known == weight.nbytes + 4
