"""Dimensions on one mesh: weights are eager's bits, and training is eager's within rounding.

Arguments: the names of meshes to try, one by one, and then the names of models.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.dimensions import ActivationCheckpointing, Compile, FullyShard, Replicate, TensorParallel
from nucleate.layout import boxes_of, cut, is_sharded, local_of
from nucleate.strategies import Parallel
from tests.multi.device import accelerator, device

VOCABULARY, WIDTH, HEADS, LENGTH = 64, 32, 4, 16


class Block(nn.Module):
    """A block whose weight for query, key and value is one matrix."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head_norm = nn.LayerNorm(WIDTH // HEADS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        parts = self.qkv(self.first_norm(x)).chunk(3, -1)
        query, key, value = (part.view(rows, length, -1, WIDTH // HEADS) for part in parts)
        query, key = self.head_norm(query), self.head_norm(key)
        heads = (part.transpose(1, 2) for part in (query, key, value))
        seen = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(rows, length, -1)
        x = x + self.dropout(self.out(seen))
        return x + self.dropout(self.down(F.gelu(self.up(self.second_norm(x)))))


class GPT(nn.Module):
    def __init__(self, tied: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("offset", torch.randn(VOCABULARY))
        if tied:
            self.head.weight = self.embed.weight
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.2)
        self.blocks[0].up.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) * self.scale + self.offset


PLAN = {
    "embed": "rowwise",
    "head": "colwise_gathered",
    "blocks.*.qkv": "fused_3",
    "blocks.*.head_norm": "replicated",
    "blocks.*.out": "rowwise",
    "blocks.*.up": "colwise",
    "blocks.*.down": "rowwise",
}

MODELS: dict[str, Callable[[], GPT]] = {
    "tied": GPT,
    "untied": lambda: GPT(tied=False),
    "dropout": lambda: GPT(dropout=0.3),
}

MESHES: dict[str, tuple[dict[str, int], Callable[[], list[Any]]]] = {
    "tp": ({"tp": -1}, lambda: [TensorParallel(PLAN)]),
    "tp x fsdp": ({"dp_shard": -1, "tp": 2}, lambda: [FullyShard(), TensorParallel(PLAN)]),
    "tp x replicate": ({"dp_replicate": -1, "tp": 2}, lambda: [Replicate(), TensorParallel(PLAN)]),
    "hsdp": ({"dp_replicate": 2, "dp_shard": -1}, lambda: [FullyShard()]),
    "hsdp x tp": ({"dp_replicate": 2, "dp_shard": -1, "tp": 2}, lambda: [FullyShard(), TensorParallel(PLAN)]),
    "replicate": ({"dp_replicate": -1}, lambda: [Replicate()]),
    "recomputed": (
        {"dp_shard": -1, "tp": 2},
        lambda: [FullyShard(reshard_after_forward=False), ActivationCheckpointing({Block}), TensorParallel(PLAN)],
    ),
    "compiled": (
        {"dp_replicate": 2, "dp_shard": -1},
        lambda: [Compile(backend="aot_eager"), FullyShard()],
    ),
}


def batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator("cpu").manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (steps, 4, LENGTH + 1), generator=generator, device="cpu").to(device())
    return [(each[:, :-1], each[:, 1:]) for each in tokens]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_plain(model: nn.Module) -> list[tuple[float, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    done = []
    for inputs, targets in batches(3):
        loss = loss_of(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done.append((loss.item(), norm.item()))
    return done


def train(runtime: Runtime, model: Any, optimizer: Any, accumulates: bool = False) -> list[tuple[float, float]]:
    """Train on this rank's rows of each batch, in one step or in two that accumulate."""
    strategy = runtime.strategy
    done = []
    for inputs, targets in batches(3):
        mine = slice(strategy.data_parallel_rank, None, strategy.data_parallel_size)
        inputs, targets = inputs[mine], targets[mine]
        if accumulates and len(inputs) > 1:
            half = len(inputs) // 2
            with runtime.no_backward_sync(model):
                first = runtime.forward_backward(model, (inputs[:half], targets[:half]), lambda *a: loss_of(*a) / 2)
            loss = first + runtime.forward_backward(model, (inputs[half:], targets[half:]), lambda *a: loss_of(*a) / 2)
        else:
            loss = loss_of(model(inputs), targets)
            runtime.backward(loss)
        norm = runtime.clip_gradients(model, optimizer, max_norm=1.0)
        assert norm is not None
        optimizer.step()
        optimizer.zero_grad()
        done.append((runtime.all_reduce(loss.detach(), group="data").item(), norm.item()))
    return done


def check_close(done: list[tuple[float, float]], expected: list[tuple[float, float]], what: str) -> None:
    for (loss, norm), (plain_loss, plain_norm) in zip(done, expected, strict=True):
        assert abs(loss - plain_loss) < 4e-6, f"{what}: losses {loss}, {plain_loss}"
        assert abs(norm / plain_norm - 1) < 1e-5, f"{what}: norms {norm}, {plain_norm}"


def check_values(model: Any, expected: dict[str, Tensor]) -> None:
    held = model.state_dict()
    assert list(held) == list(expected)
    for fqn, tensor in held.items():
        whole = expected[fqn]
        assert torch.equal(local_of(tensor), cut(tensor, whole) if is_sharded(tensor) else whole), fqn


def check_placements(runtime: Runtime, strategy: Parallel, make: Callable[[], GPT], model: Any) -> None:
    """Compare the layout that the dimensions announce with the one that they have made."""
    with torch.device("meta"):
        plain = make()
    announced = strategy.planned_layout(plain, runtime.world_size)
    assert announced is not None
    for fqn, tensor in model.named_parameters():
        expected = announced[fqn].boxes(runtime.global_rank)
        found = boxes_of(tensor) if is_sharded(tensor) else runtime.layout(model)[fqn].boxes(runtime.global_rank)
        assert [(box.begin, box.size) for box in expected] == [(box.begin, box.size) for box in found if box.numel], fqn


def check(name: str, kind: str) -> None:
    make = MODELS[kind]
    torch.manual_seed(0)
    with torch.device(device()):
        plain = make()
    weights = {fqn: tensor.clone() for fqn, tensor in plain.state_dict().items()}
    next_number = torch.rand(1, device=device())

    sizes, dimensions = MESHES[name]
    strategy = Parallel(mesh=sizes, dimensions=dimensions())
    runtime = Runtime(accelerator=accelerator(), strategy=strategy, verify="all")
    runtime.launch()
    torch.manual_seed(7 * runtime.global_rank)  # Rank 0 has the seed 0.
    with runtime.init_module(empty_init=True):
        deferred_model = make()
    model = runtime.setup(deferred_model)
    assert torch.equal(torch.rand(1, device=device()), next_number)
    assert (model.head.weight is model.embed.weight) == (kind != "untied")
    assert not model.blocks[0].up.weight.requires_grad
    check_values(model, weights)
    check_placements(runtime, strategy, make, model)

    optimizer = runtime.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    if kind == "dropout":
        if strategy.data_parallel_size > 1:
            return
        # Ranks that seed themselves drop the same values, and those that one process drops.
        torch.manual_seed(11)
        expected = train_plain(plain)
        torch.manual_seed(11 + runtime.global_rank)
        check_close(train(runtime, model, optimizer), expected, f"{name} {kind}")
        return
    if strategy.shards and name != "compiled":
        check_copy(model, plain, weights)
    expected = train_plain(plain)
    check_close(train(runtime, model, optimizer, accumulates=kind == "untied"), expected, f"{name} {kind}")
    compare_outputs(model, plain)


def check_copy(model: Any, plain: nn.Module, weights: dict[str, Tensor]) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            local_of(parameter).add_(1)  # The copy has memory of its own.
        check_values(twin, weights)
        compare_outputs(twin, plain)
        for parameter in model.parameters():
            local_of(parameter).sub_(1)
        model.load_state_dict(twin.state_dict())


def compare_outputs(model: nn.Module, plain: nn.Module) -> None:
    inputs, _ = batches(1)[0]
    trains = model.training
    with torch.no_grad():
        assert torch.allclose(model.eval()(inputs), plain.eval()(inputs), rtol=1e-4, atol=1e-4)
    model.train(trains)
    plain.train(trains)


if __name__ == "__main__":
    names, models = sys.argv[1].split(","), sys.argv[2].split(",")
    for name in names:
        for kind in models:
            check(name, kind)
            print(f"{name} {kind}: right")
