"""What torch expects of a device: names, generators, statistics, two indices, counts, files."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.sim import build
from tests.sim.device import install


def test_torch_finds_the_device(sim: Any) -> None:
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device("sim")
    assert torch.accelerator.device_count() == torch.sim.device_count() == sim.device_count() == 2
    assert torch.get_device_module("sim") is torch.sim
    assert torch.sim.get_device_name(1) == "Simulated device"
    assert dist.get_default_backend_for_device("sim") == "simccl"
    assert install() is sim


def test_it_is_away_when_it_is_not_available(sim: Any) -> None:
    sim.set_available(False)
    assert not torch.accelerator.is_available()
    assert not torch.sim.is_available()
    assert torch.accelerator.current_accelerator(check_available=True) is None
    assert torch.accelerator.device_count() == torch.sim.device_count() == 0


def test_streams_and_devices_are_current_within_their_context(sim: Any) -> None:
    before = torch.accelerator.current_stream()
    with torch.Stream("sim:1") as stream:
        assert torch.accelerator.current_stream() == torch.sim.current_stream(1) == stream
        assert torch.accelerator.current_device_index() == 1
    assert torch.accelerator.current_stream() == before
    with torch.sim.device(1), torch.sim.stream(torch.sim.Stream()) as _:
        assert torch.ones(1, device="sim").device == torch.device("sim:1")
    assert sim.current_device() == 0
    with pytest.raises(RuntimeError, match="index 2 does not exist"):
        torch.ones(1, device="sim:2")


def test_tensors_of_two_devices_do_not_meet(sim: Any) -> None:
    zero, one = torch.ones(2, device="sim:0"), torch.ones(2, device="sim:1")
    with pytest.raises(RuntimeError, match="found at least two devices, sim:0 and sim:1!"):
        zero + one
    with pytest.raises(RuntimeError, match="found at least two devices, sim:0 and cpu!"):
        zero + torch.ones(2)
    assert (zero * torch.tensor(2.0)).tolist() == [2, 2]
    assert zero[torch.tensor([0])].tolist() == [1]
    assert (zero.to("sim:1") + one).device == torch.device("sim:1")


def test_each_device_has_a_generator_of_sixteen_bytes(sim: Any) -> None:
    torch.manual_seed(5)
    cpu = torch.get_rng_state()
    draws = [torch.rand(5, device=f"sim:{index}").cpu() for index in range(2)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.get_rng_state(), cpu)
    state = torch.sim.get_rng_state("sim:0")
    assert state.numel() == 16
    more = torch.rand(5, device="sim:0")
    assert not torch.equal(more.cpu(), draws[0])
    torch.sim.set_rng_state(state, "sim:0")
    assert torch.equal(torch.rand(5, device="sim:0"), more)
    generator = torch.Generator("sim:1").manual_seed(5)
    assert torch.equal(torch.rand(5, device="sim:1", generator=generator).cpu(), draws[1])
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(5, device="sim", generator=torch.Generator())
    assert [each.device.index for each in torch.sim.default_generators] == [0, 1]


def test_dropout_draws_from_the_device(sim: Any) -> None:
    cpu, before = torch.get_rng_state(), torch.sim.get_rng_state()
    dropped = nn.functional.dropout(torch.ones(100, device="sim"))
    assert sorted(set(dropped.tolist())) == [0, 2]
    assert torch.equal(torch.get_rng_state(), cpu)
    assert not torch.equal(torch.sim.get_rng_state(), before)


def test_memory_is_counted_by_device(sim: Any) -> None:
    before = sim.allocated(0), sim.allocated(1)
    torch.accelerator.reset_peak_memory_stats(0)
    x = torch.empty(1000, device="sim:0")
    y = x.fill_(1) + 1
    assert torch.accelerator.memory_allocated(0) == sim.allocated(0) == before[0] + 8000
    del x, y
    assert (sim.allocated(0), sim.allocated(1)) == before
    assert torch.accelerator.max_memory_allocated(0) == sim.peak(0) == before[0] + 8000
    sim.reset_peak(0)
    assert sim.peak(0) == before[0]
    free, total = torch.accelerator.get_memory_info(0)
    assert total - free == before[0]


def test_copies_are_counted_by_kind_and_kernels_by_name(sim: Any) -> None:
    pinned, pageable = torch.ones(10).pin_memory(), torch.ones(5)
    sim.reset_counts()
    x = pinned.to("sim", non_blocking=True)
    y = pageable.to("sim")
    x.clone()
    x.cpu()
    # A copy that blocks is converted on the host, so 4 bytes for each element cross.
    x.to("cpu", torch.float64)
    torch.mm(x.view(2, 5), y.view(5, 1))
    counts = sim.counts()
    assert {name: counts[name] for name in ("h2d.copies", "h2d.bytes", "h2d.pinned.bytes", "h2d.pageable.bytes")} == {
        "h2d.copies": 2,
        "h2d.bytes": 60,
        "h2d.pinned.bytes": 40,
        "h2d.pageable.bytes": 20,
    }
    assert (counts["d2d.copies"], counts["d2d.bytes"]) == (1, 40)
    assert (counts["d2h.copies"], counts["d2h.bytes"], counts["late"]) == (2, 80, 2)
    assert counts["aten::mm"] == 1


def test_conversions_cross_in_the_type_that_torch_sends(sim: Any) -> None:
    pinned = torch.ones(10, dtype=torch.bfloat16).pin_memory()
    pinned.to("sim", torch.float32, non_blocking=True)
    pinned.to("sim", torch.float32)
    assert sim.counts()["h2d.bytes"] == 20 + 40


def test_kernels_copy_nothing(sim: Any) -> None:
    x = torch.ones(10, 10, device="sim")
    before = sim.counts()
    x.add_(1).mul(x).softmax(0)
    torch._foreach_add_([x, x.t()], 1)
    after = sim.counts()
    for kind in ("h2d", "d2h", "d2d"):
        assert after[f"{kind}.copies"] == before[f"{kind}.copies"]


def test_files_keep_the_index_and_map_it(sim: Any) -> None:
    file = io.BytesIO()
    torch.save(nn.Linear(2, 2).to("sim:1").state_dict(), file)
    for where, expected in ((None, "sim:1"), ("cpu", "cpu"), ("sim:0", "sim:0"), ({"sim:1": "sim:0"}, "sim:0")):
        file.seek(0)
        assert torch.load(file, map_location=where)["weight"].device == torch.device(expected)


def test_storages_and_parameters_move_and_are_swapped(sim: Any) -> None:
    storage = torch.UntypedStorage(16, device="sim:1")
    tensor = torch.empty(0, device="sim:1").set_(storage, 0, (4,)).fill_(3)
    assert copy.deepcopy(tensor).tolist() == [3] * 4
    storage.resize_(32)
    assert tensor.tolist() == [3] * 4
    assert torch.empty(0, device="sim").resize_(3).shape == (3,)
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2, device="sim"))
    torch.utils.swap_tensors(one, other)
    assert one.device.type == "sim"
    assert other.is_cpu
    assert torch.ones(2, device="sim").type() == "torch.sim.FloatTensor"


def test_installing_does_nothing_before_it_is_called_and_refuses_too_late_a_call(simulated_device: Any) -> None:
    code = (
        "import torch, tests.sim.device as device\n"
        "assert not hasattr(torch, 'sim') and not torch.accelerator.is_available()\n"
        "torch.ones((), requires_grad=True).backward()\n"
        "device.install()"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert "install() came after a backward pass" in done.stderr


def test_without_a_compiler_the_message_says_so(
    simulated_device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.delitem(sys.modules, build.NAME)
    path = os.environ["PATH"]
    with pytest.raises(build.NoCompiler, match=r"(?s)no-compiler.*Install a C\+\+ compiler"):
        build.load()
    assert os.environ["PATH"] == path
