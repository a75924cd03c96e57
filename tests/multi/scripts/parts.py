"""On 2 ranks: models without a forward, such as a `ModuleDict` of actor and critic, train as one process does."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from tests.multi.device import accelerator, device
from tests.multi.scripts.gathering import plain, same, whole

STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "fsdp": FSDPStrategy,
    "layers": lambda: FSDPStrategy(wrap=[nn.Linear]),
    "kept": lambda: FSDPStrategy(reshard_after_forward=False),
    "replicas": lambda: FSDPStrategy(num_replicas=2),
}
Loss = Callable[[Any, Tensor], Tensor]


def mlp(out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, out))


class Head(nn.Module):
    def __init__(self, trunk: nn.Module, out: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.out = nn.Linear(4, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.trunk(x))


class Agent(nn.Module):
    """Has no forward, but methods, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = mlp(2)
        self.critic = mlp(1)
        self.log_std = nn.Parameter(torch.zeros(1, 2))
        self.scale = nn.Parameter(torch.ones(()))
        self.biases = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(2))

    def value(self, x: Tensor) -> Tensor:
        return self.critic(x) * self.scale

    def loss(self, x: Tensor) -> Tensor:
        action = self.actor(x) * self.log_std.exp() + sum(self.biases)
        return action.square().mean() + self.value(x).square().mean()


def actor_critic() -> nn.Module:
    return nn.ModuleDict({"actor": mlp(2), "critic": mlp(1)})


def trunk_in_both() -> nn.Module:
    trunk = mlp(4)
    return nn.ModuleDict({"actor": Head(trunk, 2), "critic": Head(trunk, 1)})


def trunk_in_both_and_beside() -> nn.Module:
    trunk = mlp(4)
    return nn.ModuleDict({"actor": Head(trunk, 2), "critic": Head(trunk, 1), "trunk": trunk})


def tied_between_parts() -> nn.Module:
    model = nn.ModuleDict({"actor": mlp(2), "critic": mlp(1)})
    model["critic"][0].weight = model["actor"][0].weight
    return model


def nested() -> nn.Module:
    return nn.ModuleDict({"actors": nn.ModuleList(mlp(2) for _ in range(2)), "critic": mlp(1)})


def students() -> nn.Module:
    return nn.ModuleList([mlp(2).requires_grad_(False), mlp(2)])


def with_parameters() -> nn.Module:
    weights = nn.ParameterDict({"first": nn.Parameter(torch.ones(3)), "second": nn.Parameter(torch.ones(2, 3))})
    return nn.ModuleDict(
        {"actor": mlp(2), "weights": weights, "steps": nn.ParameterList([nn.Parameter(torch.ones(3))])}
    )


def both(model: Any, x: Tensor) -> Tensor:
    return model.module["actor"](x).square().mean() + model.critic(x).square().mean()


def one(model: Any, x: Tensor) -> Tensor:
    return model.module["critic"](x).square().mean()


def by_iteration(model: Any, x: Tensor) -> Tensor:
    return torch.stack([part(x).square().mean() for part in model.values()]).sum()


def with_trunk(model: Any, x: Tensor) -> Tensor:
    return both(model, x) + model.module["trunk"](x).mean()


def of_nested(model: Any, x: Tensor) -> Tensor:
    first, second = model.module["actors"]
    return (first(x) - second(x)).square().mean() + model.critic(x).mean()


def distillation(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = model.module[0](x)
    return (model.module[1](x) - target).square().mean()


def of_parameters(model: Any, x: Tensor) -> Tensor:
    scaled = x * model.weights["first"] * model.weights.second.sum(0) * model.steps[0]
    return model.module["actor"](scaled).square().mean()


def of_agent(model: Any, x: Tensor) -> Tensor:
    return model.loss(x)


def of_agent_by_parts(model: Any, x: Tensor) -> Tensor:
    return model.actor(x).square().mean() + (model.critic(x) * model.scale).square().mean()


MODELS: list[tuple[Callable[[], nn.Module], tuple[Loss, ...]]] = [
    (actor_critic, (both, one, by_iteration)),
    (trunk_in_both, (both, one, by_iteration)),
    (trunk_in_both_and_beside, (both, one, with_trunk)),
    (tied_between_parts, (both, one)),
    (nested, (of_nested,)),
    (students, (distillation,)),
    (with_parameters, (of_parameters,)),
    (Agent, (of_agent, of_agent_by_parts)),
]


class Plain:
    """Gives a plain model the attribute `module` of a wrapped one."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def start(
    make: Callable[[], Strategy], build: Callable[[], nn.Module], precision: str = "32-true"
) -> tuple[Runtime, Any]:
    runtime = Runtime(accelerator=accelerator(), strategy=make(), precision=precision)
    torch.manual_seed(0)
    with runtime.init_module():
        model = build()
    return runtime, runtime.setup(model)


def every() -> Iterator[tuple[Callable[[], Strategy], Callable[[], nn.Module], Loss]]:
    for make in STRATEGIES.values():
        for build, losses in MODELS:
            for loss in losses:
                yield make, build, loss


def data(step: int) -> tuple[Tensor, ...]:
    return torch.randn(8, 3, generator=torch.Generator(device()).manual_seed(step)).chunk(2)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)


def equal_on_all_ranks(runtime: Runtime, model: Any) -> None:
    for name, parameter in model.named_parameters():
        copies = runtime.all_gather(whole(parameter))
        assert torch.equal(copies[0], copies[1]), name
        if parameter.grad is not None:
            copies = runtime.all_gather(whole(parameter.grad))
            assert torch.equal(copies[0], copies[1]), name


def they_train_as_one_process(folder: Path) -> None:
    for make, build, loss in every():
        runtime, model = start(make, build)
        expected = plain(build)
        optimizer, reference = runtime.setup_optimizers(optimizer_of(model)), optimizer_of(expected)
        for step in range(3):
            optimizer.zero_grad()
            reference.zero_grad()
            shares = data(step)
            # Micro-batches: the first of them is not exchanged.
            for half in range(2):
                with runtime.no_backward_sync(model, enabled=half == 0):
                    runtime.backward(loss(model, shares[runtime.global_rank][half::2]) / 2)
                (sum(loss(Plain(expected), share[half::2]) for share in shares) / 4).backward()
            equal_on_all_ranks(runtime, model)
            norm = runtime.clip_gradients(model, optimizer, max_norm=0.1)
            wanted = nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
            torch.testing.assert_close(whole(norm), wanted, rtol=1e-4, atol=1e-6)
            optimizer.step()
            reference.step()
        same(model, expected)
        equal_on_all_ranks(runtime, model)
        if build is trunk_in_both and isinstance(make(), FSDPStrategy):
            assert all(hasattr(parameter, "placements") for parameter in model.parameters())


def gradients_are_accumulated_without_exchange(folder: Path) -> None:
    for make in STRATEGIES.values():
        runtime, model = start(make, Agent)
        with runtime.no_backward_sync(model):
            runtime.backward(model.loss(data(0)[runtime.global_rank]))
        for parameter in (model.log_std, model.scale, model.biases[0]):
            copies = runtime.all_gather(parameter.grad)
            assert not torch.equal(copies[0], copies[1])


def their_parts_go_through_the_precision(folder: Path) -> None:
    class Dtypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.seen: list[torch.dtype] = []

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            self.seen.append(x.dtype)
            return x

    class Methods(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Dtypes()

        def method(self, x: Tensor) -> Tensor:
            return self.part(x) * 2

    builds: list[tuple[Callable[[], nn.Module], Callable[[Any], Any]]] = [
        (lambda: nn.ModuleDict({"part": Dtypes()}), lambda model: model.module["part"]),
        (lambda: nn.ModuleDict({"part": Dtypes()}), lambda model: model.part),
        (lambda: nn.ModuleDict({"part": Dtypes()}), lambda model: dict(model.items())["part"]),
        (lambda: nn.ModuleList([Dtypes()]), lambda model: model.module[0]),
        (Methods, lambda model: model.method),
        (Methods, lambda model: model.part),
    ]
    for make in STRATEGIES.values():
        for precision in ("bf16-mixed", "bf16-true"):
            for build, reach in builds:
                for marks in (False, True):
                    runtime, model = start(make, build, precision)
                    if marks and not hasattr(model, "method"):
                        continue
                    if marks:
                        model.mark_forward_method("method")
                    output = reach(model)(data(0)[0])
                    (part,) = (module for module in model.modules() if isinstance(module, Dtypes))
                    assert part.seen == [torch.bfloat16]
                    assert output.dtype == torch.float32
                    runtime.backward(output.sum())
                    equal_on_all_ranks(runtime, model)


def after_an_evaluation_their_parameters_are_shards(folder: Path) -> None:
    for name, make in STRATEGIES.items():
        for build, losses in MODELS:
            _, model = start(make, build)
            known = {name: id(parameter) for name, parameter in model.named_parameters()}
            for context in (torch.no_grad, torch.inference_mode):
                with context():
                    losses[0](model, data(0)[0])
                assert {name: id(parameter) for name, parameter in model.module.named_parameters()} == known, name


def what_is_trained_only_later_is_averaged_too(folder: Path) -> None:
    for make in STRATEGIES.values():
        runtime, model = start(make, lambda: Agent().requires_grad_(False))
        model.requires_grad_(True)
        expected = plain(Agent)
        shares = data(0)
        runtime.backward(model.loss(shares[runtime.global_rank]))
        (sum(expected.loss(share) for share in shares) / 2).backward()
        same(model, expected, gradients=True)


def buffers_are_those_of_rank_0(folder: Path) -> None:
    build = lambda: nn.ModuleDict({"net": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))})  # noqa: E731
    runtime, model = start(DDPStrategy, build)
    expected = plain(build)
    for step in range(2):
        # Two forwards before one backward, as those of a discriminator.
        shares = data(step)
        (model.net(shares[runtime.global_rank]) * model.net(shares[runtime.global_rank] + 1)).sum().backward()
        expected["net"](shares[0])
        expected["net"](shares[0] + 1)
    model.net(torch.zeros(2, 3))
    expected["net"](torch.zeros(2, 3))
    for value, wanted in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(value, wanted)


def they_are_saved_loaded_and_copied(folder: Path) -> None:
    cases = [(make, build, losses[0]) for make in STRATEGIES.values() for build, losses in MODELS]
    for number, (make, build, loss) in enumerate(cases):
        runtime, model = start(make, build)
        optimizer = runtime.setup_optimizers(optimizer_of(model))
        for step in range(2):
            runtime.backward(loss(model, data(step)[0]))
            optimizer.step()
            optimizer.zero_grad()
        twin = copy.deepcopy(model)
        place = folder / str(number)
        runtime.save(place, {"model": model, "optimizer": optimizer})
        runtime.backward(loss(model, data(2)[0]))
        optimizer.step()
        again, other = start(make, build)
        resumed = again.setup_optimizers(optimizer_of(other))
        again.load(place, {"model": other, "optimizer": resumed})
        for copied in (twin, other):
            assert list(copied.state_dict()) == list(plain(build).state_dict())
        same(twin, gathered_plain(build, other))
        again.backward(loss(other, data(2)[0]))
        resumed.step()
        same(other, gathered_plain(build, model))
        with torch.no_grad():
            expected = loss(Plain(gathered_plain(build, twin)), data(0)[0])
            torch.testing.assert_close(loss(twin, data(0)[0]), expected, rtol=1e-4, atol=1e-5)


def models_of_two_runtimes_share_an_optimizer(folder: Path) -> None:
    """Each runtime has a mesh of its own, equal to the other's."""
    both = [start(make, actor_critic) for make in (FSDPStrategy, FSDPStrategy)]
    expected = [plain(actor_critic) for _ in both]
    (runtime, first), (_, second) = both
    assert runtime.strategy.device_mesh is not both[1][0].strategy.device_mesh
    for foreach in (False, True):
        optimizer = torch.optim.AdamW([*first.parameters(), *second.parameters()], lr=0.1, foreach=foreach)
        reference = torch.optim.AdamW([p for model in expected for p in model.parameters()], lr=0.1, foreach=foreach)
        for step in range(2):
            optimizer.zero_grad()
            reference.zero_grad()
            x = torch.cat(data(step))
            one(first, x).backward()
            by_iteration(second, x * 2).backward()
            one(Plain(expected[0]), x).backward()
            by_iteration(expected[1], x * 2).backward()
            norm = runtime.clip_gradients(first, optimizer, max_norm=0.1)
            wanted = nn.utils.clip_grad_norm_([p for model in expected for p in model.parameters()], 0.1)
            torch.testing.assert_close(whole(norm), wanted)
            optimizer.step()
            reference.step()
    for model, other in zip((first, second), expected, strict=True):
        same(model, other)
    runtime.save(folder / "two", {"first": first, "second": second, "optimizer": optimizer})
    fresh = [start(make, actor_critic)[1] for make in (FSDPStrategy, FSDPStrategy)]
    runtime.load(folder / "two", {"first": fresh[0], "second": fresh[1]}, remainder=False)
    for model, other in zip(fresh, expected, strict=True):
        same(model, other)


def gathered_plain(build: Callable[[], nn.Module], model: Any) -> nn.Module:
    """Return a plain model with the values of another."""
    result = plain(build)
    result.load_state_dict({key: whole(value) for key, value in model.state_dict().items()})
    return result


CHECKS: list[Callable[..., None]] = [
    they_train_as_one_process,
    gradients_are_accumulated_without_exchange,
    their_parts_go_through_the_precision,
    after_an_evaluation_their_parameters_are_shards,
    what_is_trained_only_later_is_averaged_too,
    buffers_are_those_of_rank_0,
    they_are_saved_loaded_and_copied,
    models_of_two_runtimes_share_an_optimizer,
]

if __name__ == "__main__":
    for check in CHECKS:
        check(Path(sys.argv[1]))
        sys.stdout.write(f"{check.__name__}\n")
