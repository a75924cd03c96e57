"""Copies run as late as torch allows, in the order of their streams and events, and no later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

N = 1000


def pinned() -> torch.Tensor:
    return torch.arange(float(N)).pin_memory()


def test_another_stream_that_does_not_wait_reads_memory_that_nobody_wrote(sim: Any) -> None:
    host = pinned()
    with torch.Stream("sim"):
        copied = host.to("sim", non_blocking=True)
    assert (copied + 1).cpu().isnan().all()


def test_a_stream_that_waits_for_an_event_reads_what_was_copied(sim: Any) -> None:
    host, event = pinned(), torch.Event("sim")
    with torch.Stream("sim"):
        copied = host.to("sim", non_blocking=True)
        event.record()
    event.wait(torch.sim.current_stream())
    assert torch.equal((copied + 1).cpu(), host + 1)


def test_a_stream_waits_for_another(sim: Any) -> None:
    host, side = pinned(), torch.Stream("sim")
    with side:
        copied = host.to("sim", non_blocking=True)
    torch.sim.current_stream().wait_stream(side)
    assert torch.equal(copied.cpu(), host)


def test_an_event_lets_only_what_came_before_it_run(sim: Any) -> None:
    host, event, copied = pinned(), torch.Event("sim"), torch.zeros(2, N, device="sim")
    side = torch.Stream("sim")
    with side:
        copied[0].copy_(host, non_blocking=True)
        event.record()
        copied[1].copy_(host, non_blocking=True)
    event.synchronize()
    assert torch.equal(copied.cpu(), torch.stack([host, torch.zeros(N)]))
    assert not side.query()
    side.synchronize()
    assert torch.equal(copied[1].cpu(), host)


def test_a_wait_is_for_the_event_as_it_was(sim: Any) -> None:
    host, event, copied = pinned(), torch.Event("sim"), torch.zeros(2, N, device="sim")
    with (side := torch.Stream("sim")):
        copied[0].copy_(host, non_blocking=True)
        event.record()
    event.wait(torch.sim.current_stream())
    with side:
        copied[1].copy_(host, non_blocking=True)
        event.record()
    assert torch.equal(copied.cpu(), torch.stack([host, torch.zeros(N)]))


def test_a_stream_runs_what_it_waits_for_through_other_streams(sim: Any) -> None:
    host, copied = pinned(), torch.empty(N, device="sim")
    first, second = torch.Stream("sim"), torch.Stream("sim")
    with first:
        copied.copy_(host, non_blocking=True)
    second.wait_stream(first)
    torch.sim.current_stream().wait_stream(second)
    assert torch.equal(copied.cpu(), host)


def test_a_buffer_that_is_overwritten_before_its_copy_ran_gives_the_new_bytes(sim: Any) -> None:
    host = pinned()
    copied = host.to("sim", non_blocking=True)
    host.fill_(7)
    assert (copied.cpu() == 7).all()


def test_a_buffer_that_is_overwritten_after_the_event_gives_the_old_bytes(sim: Any) -> None:
    host = pinned()
    copied = host.to("sim", non_blocking=True)
    event = torch.sim.current_stream().record_event()
    assert not event.query()
    event.synchronize()
    assert event.query()
    host.fill_(7)
    assert torch.equal(copied.cpu(), torch.arange(float(N)))


def test_copies_to_pinned_memory_are_late(sim: Any) -> None:
    host, source = torch.zeros(N).pin_memory(), torch.ones(N, device="sim")
    host.copy_(source, non_blocking=True)
    assert (host == 0).all()
    torch.accelerator.synchronize()
    assert (host == 1).all()


def test_copies_within_the_device_and_across_devices_are_late(sim: Any) -> None:
    source = torch.ones(N, device="sim:0")
    with torch.Stream("sim:0"):
        within = source.clone()
    assert within.cpu().isnan().all()
    across = source.to("sim:1")
    assert sim.queued(0) == 2
    assert (across.cpu() == 1).all()  # the target's stream waits for the source's
    torch.accelerator.synchronize("sim:0")
    assert (within.cpu() == 1).all()


def test_pageable_and_blocking_copies_are_not_late(sim: Any) -> None:
    pageable, blocking = torch.ones(N), pinned()
    copied = pageable.to("sim", non_blocking=True), blocking.to("sim")
    for host in (pageable, blocking):
        host.fill_(7)
    assert (copied[0].cpu() == 1).all()
    assert torch.equal(copied[1].cpu(), torch.arange(float(N)))
    assert sim.counts()["late"] == 0


def test_synchronizing_a_device_leaves_the_other_alone(sim: Any) -> None:
    host = pinned()
    for index in range(2):
        host.to(f"sim:{index}", non_blocking=True)
    torch.accelerator.synchronize("sim:0")
    assert [sim.queued(0), sim.queued(1)] == [0, 1]


def test_a_program_that_polls_comes_to_an_end(sim: Any) -> None:
    copied = pinned().to("sim", non_blocking=True)
    event = torch.sim.current_stream().record_event()
    asked = 0
    while not event.query():
        asked += 1
    assert asked > 10
    assert torch.equal(copied.cpu(), pinned())


def test_without_late_copies_nothing_waits(sim: Any) -> None:
    sim.set_late(False)
    with torch.Stream("sim"):
        copied = pinned().to("sim", non_blocking=True)
    assert torch.equal(copied.cpu(), pinned())


def test_a_pinned_buffer_that_is_gone_is_still_copied(sim: Any) -> None:
    copied = pinned().to("sim", non_blocking=True)
    torch.full((N,), 7.0).pin_memory()
    assert torch.equal(copied.cpu(), torch.arange(float(N)))


def test_memory_used_again_under_a_queued_copy_is_an_error(sim: Any) -> None:
    host, source, side = torch.zeros(N).pin_memory(), torch.ones(N, device="sim"), torch.Stream("sim")
    with side:
        host.copy_(source, non_blocking=True)
    del source
    torch.empty(N, device="sim")
    with pytest.raises(RuntimeError, match="record_stream"):
        side.synchronize()


@pytest.mark.parametrize("way", ["record_stream", "wait_stream"])
def test_memory_used_again_in_order_is_not(sim: Any, way: str) -> None:
    host, source, side = torch.zeros(N).pin_memory(), torch.ones(N, device="sim"), torch.Stream("sim")
    with side:
        host.copy_(source, non_blocking=True)
    if way == "record_stream":
        source.record_stream(side)
    else:
        torch.sim.current_stream().wait_stream(side)
    del source
    torch.empty(N, device="sim")
    side.synchronize()
    assert (host == 1).all()


def test_fresh_memory_holds_rubbish(sim: Any) -> None:
    torch.ones(N, device="sim")
    assert torch.empty(N, device="sim").cpu().isnan().all()
