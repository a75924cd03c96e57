"""Memory that is touched ahead of its writer is ordinary memory, backed by the kind of pages that was chosen."""

from __future__ import annotations

import mmap
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nucleate.cluster.settings import HUGE_PAGES
from nucleate.deferred import deferred
from nucleate.errors import ConfigurationError
from nucleate.materialize import materialize, memory
from nucleate.materialize.memory import MIN_TOUCHED_BYTES, FreshMemory, policy
from nucleate.materialize.pages import STRETCH_BYTES, PagePolicy
from nucleate.report import anonymous_bytes
from tests.device import cpu_only

pytestmark = cpu_only("pages are of the host's memory")

MIB = 1 << 20


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The calls of madvise, which are not made."""
    found: list[tuple[int, int, int]] = []

    def advise(start: int, length: int, advice: int) -> int:
        found.append((start, length, advice))
        return 0

    monkeypatch.setattr(memory, "_madvise", lambda: advise)
    return found


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """One kind of pages, the test's parameter."""
    chosen = PagePolicy(request.param)
    monkeypatch.setattr(memory, "policy", lambda: chosen)


def storage_of(size: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(size)


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def unused_memory(size: int) -> torch.Tensor:
    """Return memory that nobody has touched, unlike what malloc may give a second time."""
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


def test_it_holds_what_is_written_to_all_of_it() -> None:
    sizes = [0, 1, 4095, MIN_TOUCHED_BYTES, (5 << 20) + 3, 9 << 20]
    storages = [storage_of(size) for size in sizes]
    fresh = FreshMemory(storages)
    tensors = [bytes_of(storage) for storage in storages]
    for index, tensor in enumerate(tensors):
        fresh.touch(tensor)
        tensor.fill_(index)
    for index, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.numel() == size
        assert bool((tensor == index).all())


def test_memory_that_was_written_keeps_what_it_holds() -> None:
    tensor = torch.arange(3 << 20)
    FreshMemory([tensor.untyped_storage()]).touch(tensor)
    assert torch.equal(tensor, torch.arange(3 << 20))


@pytest.mark.parametrize("fixed", [True, False], indirect=True)
def test_touched_memory_is_there_and_the_rest_is_not(fixed: None) -> None:
    tensor = unused_memory(64 * MIB)
    fresh = FreshMemory([tensor.untyped_storage()])
    before = anonymous_bytes()
    fresh.touch(tensor[8 * MIB : 40 * MIB])
    assert 31 * MIB <= anonymous_bytes() - before <= 32 * MIB + 3 * STRETCH_BYTES
    assert not tensor.any()


def test_threads_that_write_next_to_each_other_lose_nothing() -> None:
    tensors = [bytes_of(storage_of(11 * MIB)) for _ in range(4)]
    fresh = FreshMemory(tensor.untyped_storage() for tensor in tensors)
    places = [(part, tensor) for tensor in tensors for part in tensor.split(300 * 1024 + 8)]

    def write(number: int) -> None:
        place = places[number][0]
        fresh.touch(place)
        place.fill_(number % 251)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(len(places))))
    assert all(bool((place == number % 251).all()) for number, (place, _) in enumerate(places))


@pytest.mark.parametrize("fixed", [True, False], indirect=True)
def test_large_memory_is_advised_from_end_to_end_and_small_is_not(
    calls: list[tuple[int, int, int]], fixed: None, request: pytest.FixtureRequest
) -> None:
    storage = storage_of(9 * MIB)
    FreshMemory([storage, storage_of(1 * MIB)])
    ((start, length, advice),) = calls
    assert advice == (mmap.MADV_HUGEPAGE if memory.policy().is_huge else mmap.MADV_NOHUGEPAGE)
    assert start % mmap.PAGESIZE == 0
    assert 0 <= storage.data_ptr() - start < mmap.PAGESIZE
    assert start + length == storage.data_ptr() + storage.nbytes()


@pytest.mark.parametrize("fixed", [True, False], indirect=True)
def test_every_byte_is_touched_within_its_storage(calls: list[tuple[int, int, int]], fixed: None) -> None:
    storage = storage_of(9 * MIB + 5)
    fresh = FreshMemory([storage])
    first, last = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    calls.clear()
    for part in bytes_of(storage).split(MIB):
        fresh.touch(part)
    touched: set[int] = set()
    for start, length, advice in calls:
        assert start % mmap.PAGESIZE == 0
        is_collapse = advice == memory._MADV_COLLAPSE  # of the block that holds malloc's header
        assert is_collapse or start >= first - mmap.PAGESIZE
        assert is_collapse or start + length <= last + mmap.PAGESIZE
        touched.update(range(start, start + length, mmap.PAGESIZE))
    assert touched >= set(range(first // mmap.PAGESIZE * mmap.PAGESIZE, last, mmap.PAGESIZE))


def test_memory_that_is_not_fresh_is_left_alone(calls: list[tuple[int, int, int]]) -> None:
    storage = storage_of(9 * MIB)
    fresh = FreshMemory([storage])
    calls.clear()
    fresh.touch(torch.empty(9 * MIB, dtype=torch.uint8))
    fresh.touch(torch.empty(0))
    assert not calls


def test_a_system_without_the_call_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_madvise", lambda: None)
    storage = storage_of(5 * MIB)
    fresh = FreshMemory([storage])
    assert not fresh
    fresh.touch(bytes_of(storage))


def test_a_change_of_mind_is_told_to_the_system(
    calls: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = PagePolicy()
    monkeypatch.setattr(memory, "policy", lambda: chosen)
    storage = storage_of(20 * MIB)
    fresh = FreshMemory([storage])
    for huge, seconds in ((True, 4e-3), (True, 4e-3), (False, 5e-4), (False, 5e-4)):
        chosen.took(huge, seconds)
    calls.clear()
    fresh.touch(bytes_of(storage)[:MIB])
    assert calls[0][2] == mmap.MADV_NOHUGEPAGE
    assert calls[0][1] >= storage.nbytes()


def test_the_log_says_which_pages_were_touched(caplog: pytest.LogCaptureFixture) -> None:
    with deferred():
        model = nn.Linear(2048, 2048)
    with caplog.at_level("INFO", "nucleate"):
        materialize(model)
    (said,) = [record.message for record in caplog.records if "touched" in record.message]
    assert re.fullmatch(r"New memory that this process has touched: .*\d GiB in (huge|small) pages .*", said)


def test_another_setting_is_refused_before_anything_is_made() -> None:
    script = (
        "import torch, nucleate\n"
        "runtime = nucleate.Runtime(accelerator='cpu')\n"
        "with runtime.init_module(empty_init=True):\n"
        "    model = torch.nn.Linear(4, 4)\n"
        "runtime.setup(model)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={HUGE_PAGES: "sometimes", "PATH": ""}
    )
    assert done.returncode
    assert "NUCLEATE_HUGE_PAGES is 'sometimes'; it may be 'measured', 'always', 'never'." in done.stderr


def test_the_setting_fixes_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HUGE_PAGES, "never")
    policy.cache_clear()
    try:
        assert not policy().is_huge
        assert not policy().choose()
        monkeypatch.setenv(HUGE_PAGES, "")
        policy.cache_clear()
        with pytest.raises(ConfigurationError, match="NUCLEATE_HUGE_PAGES is ''"):
            policy()
    finally:
        monkeypatch.undo()
        policy.cache_clear()
