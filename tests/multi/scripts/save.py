"""What saving promises across ranks, for every format, checked on every rank of a real group; run by test_save.py."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from nucleate.checkpoint import load, save
from nucleate.checkpoint.save_job import SaveJob
from nucleate.checkpoint.writers import slabs
from nucleate.cluster import Communicator, Environment
from nucleate.errors import CheckpointError, NucleateError, RankDisagreementError, RankFailedError
from nucleate.seed import RandomState
from tests.multi.checks import run_checks
from tests.multi.device import ACCELERATOR, ON_CPU, device, equal, start_group
from tests.multi.scripts.checkpoint import adamw, full, hybrid, plain, sharded, train

PLACES: list[tuple[str, str | None]] = [("c", None), ("c", "safetensors"), ("c.safetensors", None), ("c.pt", None)]
SOLO = Communicator(Environment(), device())


def read(path: Path) -> dict[str, Tensor]:
    """Return all tensors by key, read by whoever made the format."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.is_dir() and not (path / ".metadata").exists():
        return {key: t for file in path.glob("model*.safetensors") for key, t in load_file(file).items()}
    tree = load(path, None, SOLO) if path.is_dir() else torch.load(path, weights_only=True)
    found: dict[str, Tensor] = {}

    def visit(node: Any, prefix: str) -> None:
        if isinstance(node, Tensor):
            found[prefix] = node
        elif isinstance(node, dict):
            for key, item in node.items():
                visit(item, f"{prefix}.{key}" if prefix else str(key))

    visit(tree, "")
    return found


def assert_holds(path: Path, wanted: dict[str, Tensor]) -> None:
    found = read(path)
    assert wanted.keys() <= found.keys(), wanted.keys() - found.keys()
    assert [key for key in wanted if not equal(found[key], wanted[key])] == []


def layouts(comm: Communicator) -> dict[str, Tensor]:
    """Return tensors spread over the ranks in every way that there is."""
    world = comm.world_size
    flat = init_device_mesh(ACCELERATOR, (world,))
    square = init_device_mesh(ACCELERATOR, (2, world // 2), mesh_dim_names=("a", "b"))
    generator = torch.Generator(device()).manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def spread(whole: Tensor, mesh: Any, *placements: Any) -> Tensor:
        return distribute_tensor(whole, mesh, placements, src_data_rank=None)

    return {
        "rows": spread(tensor(8, 3), flat, Shard(0)),
        "uneven": spread(tensor(7, 3), flat, Shard(0)),
        "few": spread(tensor(1, 3), flat, Shard(0)),
        "columns": spread(tensor(3, 9), flat, Shard(1)),
        "middle": spread(tensor(2, 9, 3), flat, Shard(1)),
        "both": spread(tensor(6, 9), square, Shard(0), Shard(1)),
        "twice": spread(tensor(9, 2), square, Shard(0), Shard(0)),
        "strided": spread(tensor(16, 2), square, _StridedShard(0, split_factor=world // 2), Shard(0)),
        "scattered": spread(tensor(16, 2), square, _StridedShard(0, split_factor=4), Replicate()),
        "copies": spread(tensor(4, 2), square, Replicate(), Shard(0)),
        "whole": spread(tensor(4, 2), square, Replicate(), Replicate()),
        "scalar": spread(tensor(), flat, Replicate()),
        "empty": spread(tensor(0, 3), flat, Shard(0)),
        "transposed": spread(tensor(4, 6).t(), flat, Shard(0)),
        "plain": tensor(5),
    }


def every_layout_is_saved_whole(comm: Communicator, path: Path) -> None:
    state = layouts(comm)
    wanted = {key: full(tensor) for key, tensor in state.items()}
    for number, (name, format) in enumerate(PLACES):
        place = path / str(number) / name
        save(place, state, comm, format=format, max_shard_size=300)
        assert_holds(place, wanted)
        comm.barrier()
        with mock.patch.object(slabs, "STAGING_BYTES", 32):
            save(place, state, comm, format=format)
        assert_holds(place, wanted)


def whole_of(comm: Communicator, model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model, tied tensors once; of what is not sharded, rank 0's copy."""
    found = {f"model.{key}": comm.broadcast(full(tensor)).clone() for key, tensor in model.state_dict().items()}
    del found["model.head.weight"]
    return found


def models_and_optimizers_are_saved_whole(comm: Communicator, path: Path) -> None:
    builds = [sharded, plain, *([hybrid] if comm.world_size > 2 else [])]
    for build in builds:
        model = build(0)
        optimizer = adamw(model.parameters())
        train(model, optimizer, 2, seed=1)
        if comm.rank:  # of what is not sharded, rank 0's copy counts
            model.body[1].running_mean.fill_(comm.rank)
        wanted = whole_of(comm, model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                wanted[f"optimizer.state.model.{name}.exp_avg"] = full(optimizer.state[parameter]["exp_avg"])
        for number, (name, format) in enumerate(PLACES):
            place = path / build.__name__ / str(number) / name
            save(place, {"model": model, "optimizer": optimizer}, comm, format=format)
            assert_holds(place, wanted)


def every_rank_writes_its_own_part_and_no_more(comm: Communicator, path: Path) -> None:
    mesh = init_device_mesh(ACCELERATOR, (2, comm.world_size // 2))
    written = 0
    pwrite = slabs._pwrite

    def counted(descriptor: int, address: int, size_bytes: int, offset: int) -> None:
        nonlocal written
        written += size_bytes
        pwrite(descriptor, address, size_bytes, offset)

    wholes = [torch.randn(400, 30) for _ in range(8)]
    state: dict[str, Tensor] = {
        # Copied over one axis, so that one rank alone could write it.
        f"t{number}": distribute_tensor(whole, mesh, [Replicate(), Shard(0)])
        for number, whole in enumerate(wholes)
    }
    with mock.patch.object(slabs, "_pwrite", counted), mock.patch.object(slabs, "_num_threads", return_value=1):
        for name in ("c.safetensors", "c.pt"):
            written = 0
            save(path / name, state, comm)
            assert written == 8 * 400 * 30 * 4 // comm.world_size


def sharded_tensors_that_differ_are_refused_everywhere(comm: Communicator, path: Path) -> None:
    mesh = init_device_mesh(ACCELERATOR, (comm.world_size,))
    model = nn.ParameterDict()
    for name in ("a", "b") if comm.rank == 0 else ("b", "a"):
        model[name] = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None))
    for number, (name, format) in enumerate(PLACES):
        with pytest.raises(RankDisagreementError, match=r"rank 0 has model\.a where rank 1 has model\.b"):
            save(path / str(number) / name, {"model": model}, comm, format=format)
    comm.barrier()
    assert os.listdir(path) == []


class _Holder:
    """An object with a state of its own."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = state


def what_the_ranks_disagree_on_is_refused_by_name_everywhere(comm: Communicator, path: Path) -> None:
    rank = comm.rank
    stages = nn.ModuleDict({f"layer{rank}": nn.Linear(2, 2)})
    dtype = torch.float64 if rank else torch.float32
    optimizers = {}
    for number in range(comm.world_size):
        model = nn.Linear(2, 2)
        optimizers[number] = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.5 - 0.25 * number)}
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "keys": ({"model": stages}, r"model\.layer0\.weight is float32 \(2, 2\) on rank 0 but absent on rank 1"),
        "one more": ({"a": _Holder({"x": 1, **({"y": 2} if rank else {})})}, "a.y is absent on rank 0 but 2 on rank 1"),
        "shape": ({"t": torch.ones(3 + rank)}, r"t is float32 \(3,\) on rank 0 but float32 \(4,\) on rank 1"),
        "dtype": ({"t": torch.ones(3, dtype=dtype)}, r"t is float32 \(3,\) on rank 0 but float64 \(3,\) on rank 1"),
        "integer": ({"step": 5 + rank}, "step is 5 on rank 0 but 6 on rank 1"),
        "kind": ({"step": (5, 5.0)[rank % 2]}, r"step is 5 on rank 0 but 5\.0 on rank 1"),
        "a time": ({"began": time.time() + rank}, r"began is \d+\.\d+ on rank 0 but \d+\.\d+ on rank 1"),
        "text": ({"a": {"host": f"node{rank}"}}, "a.host is 'node0' on rank 0 but 'node1' on rank 1"),
        "in a long list": ({"seen": [*range(500), rank]}, "seen.500 is 0 on rank 0 but 1 on rank 1"),
        "bytes": ({"data": bytes([rank])}, "data is 1 bytes with the hash .* on rank 0"),
        "an option": (optimizers[rank], r"optimizer\.param_groups\.0\.lr is 0\.5 on rank 0 but 0\.25 on rank 1"),
        "many": ({"a": {str(n): rank for n in range(30)}}, "a.9 is 0 on rank 0 but 1 on rank 1; and 20 more"),
    }
    save(path / "c", {"number": 0}, comm)
    for number, (kind, (state, message)) in enumerate(wrong.items()):
        asynchronous = bool(number % 2)
        try:
            with pytest.raises(RankDisagreementError, match=message) as caught:
                save(path / "c", state, comm, asynchronous=asynchronous)
            assert "runtime.all_gather(value)" in str(caught.value)
            assert len(str(caught.value)) < 2000
        except BaseException as error:
            error.add_note(kind)
            raise
    comm.barrier()
    assert os.listdir(path) == ["c"]
    assert load(path / "c", None, SOLO) == {"number": 0}


def what_the_ranks_may_have_of_their_own_is_saved(comm: Communicator, path: Path) -> None:
    """Values of all ranks on every rank, elements of plain tensors, sets and dicts in another order, NaN, objects."""
    torch.manual_seed(comm.rank)
    names = ["a", "b", "c"] if comm.rank else ["c", "b", "a"]
    state = {
        "random": RandomState(),
        "mean": torch.full((3,), float(comm.rank)),
        "options": {"loss": float("nan"), "names": dict.fromkeys(names, 1), "size": torch.Size([2])},
        "device": torch.device("cpu", comm.rank),
    }
    save(path / "c", state, comm)
    assert load(path / "c", None, SOLO)["mean"].tolist() == [0, 0, 0]


def a_disk_that_fails_on_one_rank_fails_everywhere(comm: Communicator, path: Path) -> None:
    for number, (name, format) in enumerate(PLACES[1:]):
        place = path / str(number) / name
        state = layouts(comm)
        save(place, {"t": torch.zeros(3)}, comm, format=format)
        failure = OSError(28, "No space left on device")
        broken = mock.patch.object(slabs, "_pwrite", side_effect=failure) if comm.rank == 1 else mock.MagicMock()
        with broken, pytest.raises(CheckpointError if comm.rank == 1 else RankFailedError, match="No space left"):
            save(place, state, comm, format=format)
        comm.barrier()
        assert os.listdir(place.parent) == [name]
        assert read(place)["t"].tolist() == [0, 0, 0]
        comm.barrier()


def an_asynchronous_save_holds_the_state_at_the_call(comm: Communicator, path: Path) -> None:
    run, trained = SaveJob.run, threading.Event()

    def late(job: SaveJob) -> None:
        trained.wait()
        run(job)

    for number, (name, format) in enumerate(PLACES):
        trained.clear()
        place = path / str(number) / name
        model = sharded(0)
        optimizer = adamw(model.parameters())
        train(model, optimizer, 1, seed=1)
        wanted = whole_of(comm, model)
        groups = [{"lr": 1.0}]
        with mock.patch.object(SaveJob, "run", late):
            handle = save(
                place, {"model": model, "optimizer": optimizer, "g": groups}, comm, format=format, asynchronous=True
            )
            assert handle is not None
            groups[0]["lr"] = 2.0
            train(model, optimizer, 2, seed=2)
            assert not handle.done()
            assert not place.exists()
            trained.set()
            # Collectives of training meet those of the save in no order at all.
            train(model, optimizer, 10, seed=3)
            second = save(path / str(number) / f"second-{name}", {"model": model}, comm, format=format)
            assert second is None
            assert handle.done(), "a save waits for the one before"
        handle.wait()
        assert_holds(place, wanted)
        if name == "c" and format is None:
            assert load(place, None, SOLO)["g"] == [{"lr": 1.0}]
        assert_holds(path / str(number) / f"second-{name}", whole_of(comm, model))


def the_failure_of_an_asynchronous_save_is_heard_everywhere(comm: Communicator, path: Path) -> None:
    for heard_by_waiting in (True, False):
        place = path / f"{heard_by_waiting}.safetensors"
        failure = OSError(28, "No space left on device")
        broken = mock.patch.object(slabs, "_pwrite", side_effect=failure) if comm.rank == 1 else mock.MagicMock()
        with broken:
            handle = save(place, layouts(comm), comm, asynchronous=True)
            assert handle is not None
            while not handle.done():
                time.sleep(0.01)
        kind = CheckpointError if comm.rank == 1 else RankFailedError
        if heard_by_waiting:
            with pytest.raises(kind, match="No space left"):
                handle.wait()
        else:
            with pytest.raises(kind, match="No space left"):
                save(place, layouts(comm), comm)
        save(place, layouts(comm), comm)
        comm.barrier()


def no_rank_holds_more_than_its_part(comm: Communicator, path: Path) -> None:
    mesh = init_device_mesh(ACCELERATOR, (comm.world_size,))
    rows = 64 * comm.world_size
    local = torch.ones(64, 1 << 18)  # 64 MiB, and as many on every rank
    state = {"t": DTensor.from_local(local, mesh, [Shard(0)]), "u": torch.ones(1 << 18, 16).t()}
    save(path / "warm.pt", {"t": torch.ones(2)}, comm)
    for name in ("c.safetensors", "c.pt"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _peak_kib("VmHWM")
        save(path / name, state, comm)
        grown = _peak_kib("VmHWM") - before
        # What does not lie row by row is made so where it is, and a simulated device has memory of this process.
        per_thread = 16 if ON_CPU else 32
        assert grown < (slabs._num_threads() * per_thread + 24) * 1024, f"{name}: {grown} KiB"
    assert load_file(path / "c.safetensors")["t"].shape == (rows, 1 << 18)
    comm.barrier()
    if comm.rank == 0:
        for file in path.iterdir():
            file.unlink()


def _peak_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise AssertionError(name)


CHECKS: list[Callable[[Communicator, Path], None]] = [
    every_layout_is_saved_whole,
    models_and_optimizers_are_saved_whole,
    every_rank_writes_its_own_part_and_no_more,
    sharded_tensors_that_differ_are_refused_everywhere,
    what_the_ranks_disagree_on_is_refused_by_name_everywhere,
    what_the_ranks_may_have_of_their_own_is_saved,
    a_disk_that_fails_on_one_rank_fails_everywhere,
    an_asynchronous_save_holds_the_state_at_the_call,
    the_failure_of_an_asynchronous_save_is_heard_everywhere,
    no_rank_holds_more_than_its_part,
]


def _save_and_wait(*args: Any, **options: Any) -> None:
    handle = save(*args, **options)
    if handle is not None:
        handle.wait()


def killed(comm: Communicator, path: Path, victim: int, asynchronous: bool) -> None:
    """Save in every format with one rank killed meanwhile; the others must notice within seconds and go on."""
    state = layouts(comm)
    for number, (name, format) in enumerate(PLACES):
        save(path / str(number) / name, {"t": torch.zeros(3)}, comm, format=format)
    comm.barrier()
    index = int(sys.argv[5])
    name, format = PLACES[index]
    if comm.rank == victim:
        mock.patch("os.fsync", side_effect=lambda _: os.kill(os.getpid(), signal.SIGKILL)).start()
    begin = time.perf_counter()
    with pytest.raises(NucleateError):
        _save_and_wait(path / str(index) / name, state, comm, format=format, asynchronous=asynchronous)
    assert time.perf_counter() - begin < 20
    if victim != 0 and comm.rank == 0:
        assert os.listdir(path / str(index)) == [name]
    assert read(path / str(index) / name)["t"].tolist() == [0, 0, 0]
    sys.stdout.write("noticed\n")
    sys.stdout.flush()
    os._exit(0)


def abandoned(comm: Communicator, path: Path) -> None:
    """Leave while a checkpoint is being written, as a script does at its end."""
    write = slabs.write_tensors

    def slowly(*args: Any) -> None:
        time.sleep(1)
        write(*args)

    mock.patch.object(slabs, "write_tensors", slowly).start()
    save(path / "c.safetensors", layouts(comm), comm, asynchronous=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    communicator = start_group()
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "checks":
        run_checks(CHECKS, communicator, folder)
    elif command == "killed":
        killed(communicator, folder, int(sys.argv[3]), sys.argv[4] == "asynchronous")
    else:
        abandoned(communicator, folder)
