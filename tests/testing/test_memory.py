"""The peak-memory assertion sees what it should, and nothing else."""

import pytest

from nucleate.testing import assert_peak_memory_below, peak_memory

MIB = 2**20


# On a machine where everything else runs as well, the one that watches needs a moment.
HELD = "b = bytearray(100 * 2**20); time.sleep(0.3)"


def test_a_peak_counts_also_when_it_is_freed() -> None:
    peak = peak_memory("b = bytearray(200 * 2**20); time.sleep(0.3); del b", setup="import time")
    assert 190 * MIB <= peak.added_bytes < 220 * MIB


def test_the_setup_is_not_counted() -> None:
    peak = peak_memory("c = bytearray(10 * 2**20)", setup="b = bytearray(200 * 2**20)")
    assert peak.before_bytes >= 200 * MIB
    assert peak.added_bytes < 30 * MIB


def test_mapped_files_are_not_counted() -> None:
    mapped = "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096])"
    setup = "import mmap, tempfile; f = tempfile.TemporaryFile(); f.write(bytes(100 * 2**20)); f.flush()"
    assert_peak_memory_below(20 * MIB, mapped, setup=setup)


def test_the_assertion_tells_the_numbers() -> None:
    with pytest.raises(AssertionError, match=r"the statement added 10\d\.\d MiB to .*; the limit is 50\.0 MiB"):
        assert_peak_memory_below(50 * MIB, HELD, setup="import time")
    assert assert_peak_memory_below(150 * MIB, HELD, setup="import time").added_bytes >= 100 * MIB


@pytest.mark.parametrize(("setup", "statement"), [("raise ValueError('early')", ""), ("", "raise ValueError('late')")])
def test_code_that_fails_is_an_assertion_error_with_its_traceback(setup: str, statement: str) -> None:
    with pytest.raises(AssertionError, match=r"ValueError: (early|late)"):
        peak_memory(statement, setup=setup)


def test_code_that_prints_much_is_not_stopped() -> None:
    assert peak_memory("print('x' * 2**20)").peak_bytes > 0


def test_code_that_does_not_end_is_killed() -> None:
    with pytest.raises(AssertionError, match=r"did not end in 0\.5 s"):
        peak_memory("import time; time.sleep(60)", timeout_s=0.5)
