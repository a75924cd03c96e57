"""What several processes with a device each must show, checked on every rank of a real group; run by test_ranks.py.

Rank 0 writes the name of each check that has held into a file. The first one that fails ends all ranks; test_ranks.py
then starts those behind it.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.accelerators.placement import place
from nucleate.seed import RandomState
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from tests.deferred.equality import named_tensors
from tests.gpu.device import DEVICE_TYPE, DeviceMemory, device
from tests.gpu.models import CPU, assert_same_values, construct, deferred_by, next_numbers, whole, wholes
from tests.zoo import ZOO

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "hsdp": lambda: FSDPStrategy(num_replicas=2),
    "offload": lambda: FSDPStrategy(cpu_offload=True),
}
#: Batch statistics depend on how a batch is split.
TRAINED = [name for name in ZOO if name != "convnet"]
NUM_STEPS = 5


class Ranks:
    """What a check needs to know.

    Args:
        strategy: One of `STRATEGIES`.
        folder: A folder that all ranks see.
    """

    def __init__(self, strategy: str, folder: Path) -> None:
        self.strategy = strategy
        self.folder = folder
        self.offloads = strategy == "offload"

    def runtime(self, precision: str = "32-true") -> Runtime:
        return Runtime(accelerator=DEVICE_TYPE, strategy=STRATEGIES[self.strategy](), precision=precision)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# -- the checks ----------------------------------------------------------------------------------------------


def each_rank_has_a_device_of_its_own(ranks: Ranks) -> None:
    runtime = ranks.runtime()
    assert runtime.device == device(runtime.local_rank)
    model = deferred_by(runtime, ZOO["everything"][0])
    # A factory without a device is the case in which the index once reached what ranks compare.
    model.register_buffer("ones", torch.ones(3, device=runtime.device))
    runtime.setup(model)
    for name, tensor in named_tensors(model).items():
        is_kept_on_host = ranks.offloads and isinstance(tensor, nn.Parameter) and tensor.dim() > 0
        assert local(tensor).device == (CPU if is_kept_on_host else runtime.device), name
    gathered = runtime.all_gather(torch.tensor(float(runtime.global_rank), device=runtime.device))
    assert gathered.device == runtime.device
    assert gathered.tolist() == list(range(runtime.world_size))


def weights_and_generators_are_eagers(ranks: Ranks) -> None:
    for name, (make, _) in ZOO.items():
        for precision in ("32-true", "bf16-true") if name != "everything" else ("32-true",):
            runtime = ranks.runtime(precision)
            torch.manual_seed(3)
            with runtime.precision.module_init_context(), runtime.device:
                eager = make()
            expected = next_numbers(runtime.device)
            # Ranks that were seeded differently construct what rank 0's seed says.
            model = deferred_by(runtime, make, seed=3 + 1000 * runtime.global_rank)
            runtime.setup(model)
            for ours, eagers in zip(next_numbers(runtime.device), expected, strict=True):
                assert torch.equal(ours, eagers), f"{name}: a generator is elsewhere"
            assert_same_values(wholes(model), wholes(eager))


def memory_is_this_ranks_part(ranks: Ranks) -> None:
    runtime = ranks.runtime()
    torch.manual_seed(3)
    with runtime.init_module(empty_init=True):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    memory = DeviceMemory(runtime.local_rank)
    runtime.setup(model)
    held = 0 if ranks.offloads else sum(local(p).nbytes for p in model.parameters())
    if ranks.strategy == "fsdp":
        assert held == 32 * 2**20
    # DDP takes as much for its buckets of gradients.
    gradients = held if ranks.strategy == "ddp" else 0
    assert memory.peak_bytes() <= held + gradients + 4 * 2**20 + 2 * 2**20, f"{memory.peak_bytes() / 2**20} MiB"


def training_follows_a_plain_loop(ranks: Ranks) -> None:
    for name in TRAINED:
        make, sample = ZOO[name]
        runtime = ranks.runtime()
        expected, norms, weights = train_alone(name, runtime.device)
        model = deferred_by(runtime, make)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        wrapped, optimizer = runtime.setup(model, optimizer)
        generator = torch.Generator().manual_seed(7)
        for step in range(NUM_STEPS):
            batch = sample(generator).chunk(runtime.world_size)[runtime.global_rank].to(runtime.device)
            loss = loss_of(wrapped, batch)
            runtime.backward(loss)
            norm = runtime.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            close(runtime.all_reduce(loss.detach()), expected[step], name)
            close(whole(norm), norms[step], name)
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(whole(parameter), weights[key], rtol=1e-3, atol=1e-4)


def accumulated_gradients_are_those_of_the_whole_batch(ranks: Ranks) -> None:
    make, sample = ZOO["gpt"]
    runtime = ranks.runtime()
    batches = sample(torch.Generator().manual_seed(7)).chunk(2 * runtime.world_size)
    eager, _ = construct(make, on=runtime.device)
    losses = [loss_of(eager, batch.to(runtime.device)) for batch in batches]
    (sum(losses) / len(losses)).backward()
    model = deferred_by(runtime, make)
    wrapped = runtime.setup(model)
    mine = [batches[runtime.global_rank], batches[runtime.world_size + runtime.global_rank]]
    for number, batch in enumerate(mine):
        with runtime.no_backward_sync(wrapped, enabled=number == 0):
            runtime.backward(loss_of(wrapped, batch.to(runtime.device)) / 2)
    for (name, parameter), plain in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(whole(parameter.grad), plain.grad.cpu(), rtol=1e-3, atol=1e-6, msg=name)


def files_are_loaded_before_and_after_setup(ranks: Ranks) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4096, 9001)  # more rows than one staging buffer holds, and an odd number
            self.head = nn.Linear(64, 8)
            self.register_buffer("table", torch.rand(5))

    generator = torch.Generator().manual_seed(1)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Large().state_dict().items()}
    paths = {}
    for dtype in (torch.float32, torch.bfloat16):
        stored = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        for suffix in (".safetensors", ".pt"):
            path = ranks.folder / f"large-{str(dtype).removeprefix('torch.')}{suffix}"
            paths[path] = stored
            if dist.get_rank() == 0:
                save_file(stored, path) if suffix == ".safetensors" else torch.save(stored, path)
    dist.barrier()
    for path, stored in paths.items():
        for is_before in (True, False):
            runtime = ranks.runtime()
            with runtime.init_module(empty_init=True):
                model = Large()
            if is_before:
                runtime.load_raw(path, model)
            wrapped = runtime.setup(model)
            if not is_before:
                runtime.load_raw(path, wrapped)
            assert_same_values(wholes(model), {name: tensor.float() for name, tensor in stored.items()})


def checkpoints_of_every_format_resume_exactly(ranks: Ranks) -> None:
    make, sample = ZOO["gpt"]
    runtime = ranks.runtime()

    def made(seed: int) -> tuple[nn.Module, Any, Any]:
        model = deferred_by(runtime, make, seed)
        wrapped, optimizer = runtime.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        return model, wrapped, optimizer

    def step(wrapped: Any, optimizer: Any, seed: int) -> float:
        batch = sample(torch.Generator().manual_seed(seed)).to(runtime.device)
        loss = loss_of(wrapped, batch)
        runtime.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    model, wrapped, optimizer = made(3)
    for seed in range(2):
        step(wrapped, optimizer, seed)
    kept = wholes(model)
    moments = moments_of(optimizer)
    places: list[tuple[str, str | None]] = [("c", None), ("s", "safetensors"), ("c.safetensors", None), ("c.pt", None)]
    for name, form in places:
        runtime.save(ranks.folder / name, {"model": wrapped, "optimizer": optimizer, "step": 2}, format=form)
    expected = [step(wrapped, optimizer, seed) for seed in range(2, 4)]
    for name, _ in places:
        other, resumed, its_optimizer = made(99)
        state = {"model": resumed, "optimizer": its_optimizer, "step": 0}
        runtime.load(ranks.folder / name, state)
        assert state["step"] == 2, name
        assert_same_values(wholes(other), kept)
        assert_same_values(moments_of(its_optimizer), moments)
        held = [local(value) for state in its_optimizer.state.values() for value in state.values()]
        assert {tensor.device for tensor in held if tensor.dim()} == {CPU if ranks.offloads else runtime.device}
        torch.testing.assert_close([step(resumed, its_optimizer, seed) for seed in range(2, 4)], expected)


def generators_of_every_rank_are_saved_and_restored(ranks: Ranks) -> None:
    runtime = ranks.runtime()
    runtime.launch()
    torch.manual_seed(50 + runtime.global_rank)
    torch.rand(3, device=runtime.device)
    runtime.save(ranks.folder / "random", {"random": RandomState()})
    expected = next_numbers(runtime.device)
    torch.manual_seed(1)
    runtime.load(ranks.folder / "random", {"random": RandomState()})
    for ours, before in zip(next_numbers(runtime.device), expected, strict=True):
        assert torch.equal(ours, before)
    others = runtime.all_gather(expected[0].to(runtime.device))
    assert not torch.equal(others[0], others[1])


def real_models_are_made_alike(ranks: Ranks) -> None:
    runtime = ranks.runtime()
    torch.manual_seed(runtime.global_rank)
    model = ZOO["gpt"][0]()
    runtime.launch()
    torch.manual_seed(0)
    first = ZOO["gpt"][0]()
    runtime.setup(model)
    assert_same_values(wholes(model), wholes(place(first, CPU)))


def shards_wait_in_pinned_memory(ranks: Ranks) -> None:
    runtime = ranks.runtime()
    model = deferred_by(runtime, ZOO["gpt"][0])
    runtime.setup(model)
    shards = [local(parameter) for parameter in model.parameters()]
    if ranks.offloads:
        assert all(shard.is_pinned() for shard in shards if shard.numel())
    else:
        assert all(shard.device == runtime.device for shard in shards)


CHECKS: tuple[Callable[[Ranks], None], ...] = (
    each_rank_has_a_device_of_its_own,
    weights_and_generators_are_eagers,
    memory_is_this_ranks_part,
    training_follows_a_plain_loop,
    accumulated_gradients_are_those_of_the_whole_batch,
    files_are_loaded_before_and_after_setup,
    checkpoints_of_every_format_resume_exactly,
    generators_of_every_rank_are_saved_and_restored,
    real_models_are_made_alike,
    shards_wait_in_pinned_memory,
)

# -- what they are made of -----------------------------------------------------------------------------------


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    output = model(batch)
    output = output[0] if isinstance(output, tuple) else output
    return output.float().square().mean()


def train_alone(name: str, on: torch.device) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Train the same model by hand, eagerly, on the whole batch."""
    make, sample = ZOO[name]
    model, _ = construct(make, on=on)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(7)
    losses, norms = [], []
    for _ in range(NUM_STEPS):
        loss = loss_of(model, sample(generator).to(on))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0).detach().cpu())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().cpu())
    return losses, norms, {key: whole(p) for key, p in model.named_parameters()}


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=1e-4, atol=1e-6, msg=lambda text: f"{what}: {text}")


def moments_of(optimizer: Any) -> dict[str, Tensor]:
    return {
        f"{number}.{key}": whole(value)
        for number, state in enumerate(optimizer.state.values())
        for key, value in state.items()
    }


def main(strategy: str, folder: Path, names: Sequence[str]) -> None:
    """Run those of the checks that are named, each in a folder of its own."""
    torch.backends.cudnn.deterministic = True
    for check in CHECKS:
        if check.__name__ not in names:
            continue
        ranks = Ranks(strategy, folder / check.__name__)
        ranks.runtime().launch()
        if dist.get_rank() == 0:
            ranks.folder.mkdir()
        dist.barrier()
        try:
            check(ranks)
        except BaseException:
            text = f"{check.__name__} on rank {dist.get_rank()}: {traceback.format_exc()}"
            (folder / f"failed-{dist.get_rank()}").write_text(text)
            raise
        # So that a check that holds on rank 0 alone is not taken for one that holds.
        dist.barrier()
        if dist.get_rank() == 0:
            with (folder / "passed").open("a") as file:
                file.write(f"{check.__name__}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
