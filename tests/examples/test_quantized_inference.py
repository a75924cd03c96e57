"""The example that compares ways to load: losses, memory, limits; its table and chart hold what it measured.

The quantized ways are run by the tests of nucleate-bitsandbytes, where that is installed.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from tests.multi.ranks import ROOT

SCRIPT = ROOT / "examples" / "03_quantized_inference.py"
TINY = ("--size", "tiny", "--device", "cpu", "--tokens", "3", "--train-steps", "30")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as python does for the script it runs
    spec = importlib.util.spec_from_file_location("quantized_inference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nothing_installed(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "is_there", lambda package: False)


def cells(table: str, title: str) -> list[str]:
    """Return a column of a table in Markdown, without its title."""
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if "|" in line]
    return [row[header.index(title, 1)] for row in rows]


def test_weights_in_bf16_have_one_loss_whichever_way_they_are_loaded(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "is_there", lambda package: package == "transformers")
    example.main([*TINY, "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    for way, line in {"e": "nucleate-bitsandbytes", "fabric": "lightning"}.items():
        assert f"Left out: {way} ({example.WAYS[way]}), for which `pip install {line}`." in printed
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    assert cells(table, "") == [*(f"{way}: {example.WAYS[way]}" for way in "abcd"), "transformers"]
    *losses, of_transformers = cells(table, "held-out loss")
    assert len(set(losses)) == 1
    # Guessing each byte of 256 costs 5.5 nats.
    assert float(losses[0]) < 3.5
    # Its model rounds angles to bf16.
    assert float(of_transformers) == pytest.approx(float(losses[0]), abs=0.01)
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["load_s"]) > 0 for row in rows)
    assert all(float(row["tokens_per_s"]) > 0 for row in rows[:-1])
    config = example.CONFIG
    attention = 2 * config.dim * (config.dim + config.num_kv_heads * config.head_dim)
    layer = attention + 3 * config.dim * config.hidden_dim + 2 * config.dim
    numel = config.num_layers * layer + config.dim + 2 * config.vocab_size * config.dim
    assert {float(row["kept_bytes"]) for row in rows} == {2.0 * numel}
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv", "table.md", "table.png"]


def test_a_way_that_harms_the_weights_does_not_pass_for_a_fast_one(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = example.run_watched

    def harmed(command: list[str], *limits: int) -> dict[str, object]:
        result = run(command, *limits)
        return result | {"loss": result["loss"] + 0.001} if command[command.index("--way") + 1] == "d" else result

    monkeypatch.setattr(example, "run_watched", harmed)
    with pytest.raises(AssertionError, match="do not have one loss"):
        example.main([*TINY, "--ways", "a", "d", "--folder", str(tmp_path)])


def test_weights_that_are_given_are_measured_in_place_of_random_ones(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example.write_random(tmp_path / "random", example.CONFIG)
    tensors = example.read_whole(tmp_path / "random")
    assert tensors["lm_head.weight"].float().std().item() == pytest.approx(0.02, rel=0.05)
    # Its file is in fp32: what is kept is bf16 nevertheless.
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    own = ["--weights", str(tmp_path / "other.safetensors"), "--folder", str(tmp_path / "out")]
    example.main([*TINY, "--ways", "a", "d", *own])
    assert "Wrote random weights" not in capsys.readouterr().out
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        kept = {float(row["kept_bytes"]) for row in csv.DictReader(file)}
    assert kept == {float(sum(2 * tensor.numel() for tensor in tensors.values()))}


def test_a_limit_kills_the_ways_that_need_more_and_the_table_says_when(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 0.41 GiB in bf16 and 0.82 in fp32, beside what an interpreter with torch takes.
    own = ["--size", "200M", "--device", "cpu", "--train-steps", "3", "--folder", str(tmp_path)]
    example.main([*own, "--ways", "a", "d", "--limits", "0.95", "0.4"])
    table = (tmp_path / "survivors.md").read_text()
    assert table in capsys.readouterr().out
    naive, lazy = cells(table, "limit 0.95 GiB")
    assert naive.startswith("killed at ")
    assert lazy.endswith(" GiB")
    assert all(cell.startswith("killed at ") for cell in cells(table, "limit 0.4 GiB"))
    assert cells(table, "kept, GiB") == ["", "0.4"]
    assert [path.name for path in tmp_path.iterdir()] == ["survivors.md"]


def test_a_limit_beyond_what_the_machine_has_to_give_is_refused(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="limit of 100000 GiB cannot be tried"):
        example.main([*TINY, "--ways", "d", "--limits", "100000", "--folder", str(tmp_path)])


def test_the_largest_size_is_held_to_limits_on_a_cpu(example: ModuleType) -> None:
    assert example.parse(["--size", "7B", "--device", "cpu"]).limits == [20, 14, 8]
    assert example.parse(["--size", "7B", "--device", "cuda"]).limits is None
    assert example.parse(["--size", "7B", "--device", "cpu", "--limits", "8"]).limits == [8]


# What the scripts below do to be watched.
PREFIX = f"""
import mmap, sys, time; sys.path.insert(0, {str(SCRIPT.parent)!r})
from fresh_process import measured, report
def file_in_private(path, size):
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
"""


def test_the_peak_of_a_measured_piece_is_what_it_took_though_it_gave_it_back(
    example: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(2**24))
    script = tmp_path / "script.py"
    script.write_text(
        PREFIX + "before = bytearray(b'x' * 2**26)\n"
        "with measured():\n"
        "    taken = bytearray(b'x' * 2**25)\n"
        f"    mapped = file_in_private({str(tmp_path / 'file')!r}, 2**24)\n"
        "    sum(mapped[::4096])\n"
        "    time.sleep(0.1)\n"
        "    del taken\n"
        "after = bytearray(b'x' * 2**27)\n"
        "report({'said': 1})\n"
    )
    result = example.run_watched([str(script)])
    assert result["said"] == 1
    assert 2**25 <= result["host_bytes"] < 2**26.5
    assert 2**24 <= result["mapped_bytes"] < 2**24.5
    assert result["process_bytes"] >= result["host_bytes"] + 2**26


def test_memory_beyond_the_limit_kills_and_pages_of_mapped_files_do_not_count(
    example: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(2**28))
    script = tmp_path / "script.py"
    script.write_text(
        PREFIX + "with measured():\n"
        f"    mapped = file_in_private({str(tmp_path / 'file')!r}, 2**28)\n"
        "    sum(mapped[::4096])\n"
        "    if sys.argv[1:] == ['write']: mapped[::4096] = bytes(2**16)\n"
        "    time.sleep(0.1)\n"
        "report({'said': 1})\n"
    )
    limit = 2**27
    assert example.run_watched([str(script)], limit, 2**28)["said"] == 1
    # Pages that are written to are the process's own.
    assert example.run_watched([str(script), "write"], limit, 2**28)["killed_s"] > 0


def test_the_kernel_refuses_what_would_outrun_the_limit(example: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PREFIX + "with measured():\n    mmap.mmap(-1, 2**34, flags=mmap.MAP_PRIVATE)\n")
    assert example.run_watched([str(script)], 2**30)["killed_s"] >= 0


def test_a_way_that_fails_ends_the_example_with_what_it_said(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"no header")
    with pytest.raises(SystemExit, match=r"other\.safetensors"):
        example.main(
            [*TINY, "--ways", "d", "--folder", str(tmp_path), "--weights", str(tmp_path / "other.safetensors")]
        )


def test_nothing_to_measure_is_refused(example: ModuleType, nothing_installed: None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="leaves nothing"):
        example.main([*TINY, "--ways", "e", "f", "--folder", str(tmp_path)])


def test_training_stops_in_time_and_leaves_the_number_of_threads_alone(example: ModuleType, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    _, steps, seconds = example.train(tmp_path / "trained", steps=100_000, at_most_s=1)
    assert steps < 100_000
    assert seconds < 10
    assert torch.get_num_threads() == threads
