"""Memory that is advised to be backed by huge pages is ordinary memory."""

from __future__ import annotations

import pytest
import torch

from nucleate.materialize import memory


@pytest.mark.parametrize("size_bytes", [0, 1, 4095, memory.MIN_ADVISED_BYTES, (5 << 20) + 3])
def test_it_holds_what_is_written_to_all_of_it(size_bytes: int) -> None:
    storage = memory.allocate(size_bytes, torch.device("cpu"))
    assert storage.nbytes() == size_bytes
    tensor = torch.empty(0, dtype=torch.uint8).set_(storage)
    assert bool((tensor.fill_(7) == 7).all())


def test_only_whole_huge_pages_inside_the_memory_are_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda start, length, advice: calls.append((start, length)))
    storage = memory.allocate(9 << 20, torch.device("cpu"))
    memory.allocate(1 << 20, torch.device("cpu"))
    ((start, length),) = calls
    assert start % (2 << 20) == length % (2 << 20) == 0
    assert storage.data_ptr() <= start
    assert start + length <= storage.data_ptr() + storage.nbytes()


def test_a_system_without_the_call_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    assert memory.allocate(5 << 20, torch.device("cpu")).nbytes() == 5 << 20
