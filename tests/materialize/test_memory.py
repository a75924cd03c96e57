"""Memory that is advised to be backed by huge pages is ordinary memory."""

from __future__ import annotations

import mmap

import pytest
import torch

from nucleate.materialize import memory
from nucleate.materialize.memory import MIN_ADVISED_BYTES, advise_huge_pages
from tests.device import cpu_only

pytestmark = cpu_only("huge pages are of the host's memory")

HUGE_PAGE = 2 << 20


def test_it_holds_what_is_written_to_all_of_it() -> None:
    sizes = [0, 1, 4095, MIN_ADVISED_BYTES, (5 << 20) + 3, 9 << 20]
    storages = [torch.UntypedStorage(size) for size in sizes]
    advise_huge_pages(storages)
    tensors = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages]
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    for index, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.numel() == size
        assert bool((tensor == index).all())


def test_memory_that_was_written_keeps_what_it_holds() -> None:
    tensor = torch.arange(3 << 20)
    advise_huge_pages([tensor.untyped_storage()])
    assert torch.equal(tensor, torch.arange(3 << 20))


def test_large_memory_is_advised_from_end_to_end_and_small_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda start, length, advice: calls.append((start, length)))
    storage = torch.UntypedStorage(9 << 20)
    advise_huge_pages([storage, torch.UntypedStorage(1 << 20)])
    (start, length), (begin, huge) = calls
    assert start % mmap.PAGESIZE == 0
    assert 0 <= storage.data_ptr() - start < mmap.PAGESIZE
    assert start + length == storage.data_ptr() + storage.nbytes()
    assert huge == HUGE_PAGE
    assert begin % HUGE_PAGE == 0
    assert begin <= storage.data_ptr() < begin + HUGE_PAGE


def test_a_system_without_the_call_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    advise_huge_pages([torch.UntypedStorage(5 << 20)])
