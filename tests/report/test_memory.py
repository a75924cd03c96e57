from __future__ import annotations

import subprocess
import sys

import pytest

from nucleate.report import anonymous_bytes, format_bytes, peak_rss_bytes
from nucleate.report import memory as memory_module

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def known(num_bytes: int | None) -> int:
    assert num_bytes is not None
    return num_bytes


@linux_only
def test_the_peak_rises_with_a_large_allocation_and_stays() -> None:
    block = bytearray(b"x") * (64 * 2**20)
    during = known(peak_rss_bytes())
    del block
    assert during >= 64 * 2**20
    # The kernel counts pages per CPU and adds them up now and then: a peak may be off by some.
    assert known(peak_rss_bytes()) >= during - 2 * 2**20


@linux_only
def test_anonymous_memory_counts_an_allocation_and_forgets_it() -> None:
    before = known(anonymous_bytes())
    block = bytearray(b"x") * (512 * 2**20)
    during = known(anonymous_bytes())
    del block
    # The kernel counts per CPU and adds up after some faults, of which one may be a huge page.
    assert during - before >= 256 * 2**20
    assert during - known(anonymous_bytes()) >= 256 * 2**20


@linux_only
def test_the_peak_is_this_program_s_own_and_not_its_parent_s() -> None:
    block = bytearray(b"x") * (256 * 2**20)
    # The file alone, not the package: with torch in it the child would not be small.
    script = f"exec(open({memory_module.__file__!r}).read()); print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    del block
    assert int(child.stdout) < 128 * 2**20


def test_a_system_without_proc_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_STATUS", memory_module.Path("/nowhere/status"))
    peak = peak_rss_bytes()
    assert peak is None or peak > 2**20
    assert anonymous_bytes() is None


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1024.0 TiB"),
    ],
)
def test_bytes_are_written_for_people(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
