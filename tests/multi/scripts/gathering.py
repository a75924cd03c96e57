"""On 2 or 4 ranks: what code sees of a sharded model, and when it may use it, beside forward and backward."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from nucleate import Runtime
from nucleate.errors import ConfigurationError, UsageError
from nucleate.strategies import FSDPStrategy, Strategy
from tests.multi.device import ON_CPU, accelerator, device


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 5)
        self.down = nn.Linear(5, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Layer(nn.Module):
    """Holds a module that others hold too."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.own = nn.Linear(7, 7)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) + self.shared(x)


class Model(nn.Module):
    """Has units, parameters of the root before and after them, sizes that 2 does not divide, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 7)
        self.blocks = nn.ModuleList(Block(7) for _ in range(2))
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 1)
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.norm(x))) * self.temperature.exp()

    def score(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(x)))

    @torch.no_grad()
    def generate(self, x: Tensor) -> Tensor:
        return torch.stack([self(x), self(x * 2)])


class ByTorch(Strategy):
    """A strategy as another package writes it: `fully_shard`, and nothing else."""

    distributed = True
    shards = True

    def __init__(self, shards_root: bool) -> None:
        self._shards_root = shards_root

    def module_init_context(self) -> AbstractContextManager[None]:
        return nullcontext()

    def lay_out(self, model: nn.Module) -> None:
        mesh = init_device_mesh(self.device.type, (self.environment.world_size,))
        whole = {parameter for parameter in model.parameters() if parameter.dim() == 0}
        for module in [m for m in model.modules() if isinstance(m, (Block, Layer))] + [model] * self._shards_root:
            fully_shard(module, mesh=mesh, ignored_params=whole)


POLICIES: dict[str, Callable[[], Strategy]] = {
    "another's": lambda: ByTorch(shards_root=True),
    "auto": FSDPStrategy,
    "kept": lambda: FSDPStrategy(reshard_after_forward=False),
    "freed": lambda: FSDPStrategy(reshard_after_forward=True),
    "nested": lambda: FSDPStrategy(wrap=lambda name, _: name.startswith("blocks")),
    "replicas": lambda: FSDPStrategy(num_replicas=2),
}
if int(os.environ.get("WORLD_SIZE", 1)) == 4:
    # Shards of shards need a world of 4: after forward each parameter is spread over 2 ranks.
    POLICIES = {"smaller": lambda: FSDPStrategy(reshard_after_forward=2), "replicas": POLICIES["replicas"]}


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator(device()).manual_seed(seed))


def start(make: Callable[[], Strategy] = FSDPStrategy, build: Callable[[], nn.Module] = Model) -> tuple[Runtime, Any]:
    runtime = Runtime(accelerator=accelerator(), strategy=make())
    torch.manual_seed(0)
    with runtime.init_module():
        model = build()
    return runtime, runtime.setup(model)


def plain(build: Callable[[], nn.Module] = Model) -> Any:
    torch.manual_seed(0)
    return build()


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def all_policies() -> Iterator[tuple[Runtime, Any]]:
    for make in POLICIES.values():
        yield start(make)


def gathered(parameters: Iterator[tuple[str, nn.Parameter]]) -> list[str]:
    """Return the names of parameters that are not those of an optimizer; the scalar is never sharded."""
    return [name for name, parameter in parameters if not hasattr(parameter, "placements") and parameter.dim()]


def train(runtime: Runtime, model: Any, steps: int = 2) -> None:
    optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    model.train()
    for step in range(steps):
        runtime.backward(model(batch(step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def train_plain(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for step in range(steps):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(model: Any, expected: nn.Module, gradients: bool = False) -> None:
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        value, wanted = (parameter.grad, other.grad) if gradients else (parameter, other)
        assert value is not None, name
        torch.testing.assert_close(
            whole(value), wanted.detach(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


# -- looks -------------------------------------------------------------------------------------------------


def after_an_evaluation_everyone_sees_the_shards() -> None:
    for runtime, model in all_policies():
        known = {name: id(parameter) for name, parameter in model.named_parameters()}
        for forward in (model, model.module, model.generate, model.module.generate):
            model.eval()
            with torch.no_grad():
                forward(batch())
            for seen in (model, model.module):
                assert {name: id(parameter) for name, parameter in seen.named_parameters()} == known
            assert not gathered(model.module.stem.named_parameters())
            assert not gathered(model.blocks.named_parameters())
        train(runtime, model)
        expected = plain()
        train_plain(expected)
        same(model, expected)


def after_a_marked_method_without_gradients_everyone_sees_the_shards() -> None:
    for _, model in all_policies():
        model.mark_forward_method("score")
        model.mark_inference_method("generate")
        expected = plain()
        with torch.no_grad():
            torch.testing.assert_close(model.score(batch()), expected.score(batch()))
            assert not gathered(model.module.named_parameters())
            model.generate(batch())
            assert not gathered(model.module.named_parameters())
        for generate in (model.generate, model.module.generate):
            generate(batch())
            assert not gathered(model.module.named_parameters())
        model.score(batch()).sum().backward()
        expected.score(batch()).sum().backward()
        torch.testing.assert_close(whole(model.stem.weight.grad), expected.stem.weight.grad)


def a_look_before_the_backward_sees_shards_and_the_gradients_stay_right() -> None:
    for _, model in all_policies():
        known, expected = [*model.parameters()], plain()
        expected(batch()).square().mean().backward()
        loss = model(batch()).square().mean()
        assert list(map(id, model.parameters())) == list(map(id, known))
        assert id(model.get_parameter("stem.weight")) in map(id, known)
        model.zero_grad()
        model.apply(lambda module: gathered_nothing(module))
        loss.backward()
        same(model, expected, gradients=True)


def gathered_nothing(module: nn.Module) -> None:
    assert not gathered(iter(module.named_parameters(recurse=False)))


def a_single_rank_may_look_before_the_backward() -> None:
    for runtime, model in all_policies():
        expected = plain()
        expected(batch()).square().mean().backward()
        loss = model(batch()).square().mean()
        if runtime.is_global_zero:
            assert not gathered(model.named_parameters())
        loss.backward()
        same(model, expected, gradients=True)


def a_look_before_the_backward_leaves_checkpointing_alone() -> None:
    class Repeated(Model):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.stem, x, use_reentrant=False)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return self.head(torch.tanh(self.norm(x))) * self.temperature.exp()

    for make in POLICIES.values():
        _, model = start(make, Repeated)
        expected = plain()
        expected(batch()).square().mean().backward()
        loss = model(batch().requires_grad_()).square().mean()
        assert not gathered(model.named_parameters())
        loss.backward()
        same(model, expected, gradients=True)


def freezing_before_the_backward_holds() -> None:
    _, model = start()
    loss = model(batch()).square().mean()
    model.requires_grad_(False)
    loss.backward()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def a_change_of_gathered_parameters_does_not_make_them_the_models() -> None:
    for runtime, model in all_policies():
        model(batch())
        model.module.head.requires_grad_(False)  # by the module itself, which has the gathered parameters now
        runtime.backward(model(batch()).square().mean())
        runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
        assert not gathered(model.named_parameters())


def weights_that_change_after_a_forward_without_backward_count_in_the_next_one() -> None:
    for _, model in all_policies():
        model.eval()
        model(batch())
        expected = plain().eval()
        for parameter in (*model.parameters(), *expected.parameters()):
            parameter.data.mul_(0.5)
        torch.testing.assert_close(model(batch()), expected(batch()))
        model(batch())
        model.load_state_dict({key: value.mul(2) for key, value in model.state_dict().items()}, strict=False)
        expected.load_state_dict({key: value.mul(2) for key, value in expected.state_dict().items()}, strict=False)
        torch.testing.assert_close(model(batch()), expected(batch()))


def two_forwards_before_one_backward_are_right() -> None:
    for _, model in all_policies():
        expected = plain()
        (expected(batch()) * expected(batch(1))).mean().backward()
        (model(batch()) * model(batch(1))).mean().backward()
        same(model, expected, gradients=True)


# -- inference mode ----------------------------------------------------------------------------------------


def training_is_right_in_any_order_with_inference_mode() -> None:
    def infer(model: Any) -> Tensor:
        model.eval()
        with torch.inference_mode():
            return model(batch(9)).clone()

    def evaluate(model: Any) -> Tensor:
        model.eval()
        with torch.no_grad():
            return model(batch(9))

    orders = (("i", "t"), ("t", "i", "t"), ("i", "e", "i", "t", "i"), ("e", "i", "t"))
    for order in orders:
        for runtime, model in all_policies():
            expected = plain()
            for step in order:
                if step == "t":
                    train(runtime, model)
                    train_plain(expected)
                else:
                    look = infer if step == "i" else evaluate
                    torch.testing.assert_close(look(model), look(expected), rtol=1e-4, atol=1e-5)
            same(model, expected)


def a_part_may_run_first_and_in_inference_mode() -> None:
    for runtime, model in all_policies():
        hidden = torch.zeros(4, 7)
        if hasattr(model.blocks[0], "reshard"):
            with torch.inference_mode():
                model.blocks[0](hidden)
            model.blocks[1](hidden).sum().backward()
            model.zero_grad()
        expected = plain()
        train(runtime, model)
        train_plain(expected)
        same(model, expected)


# -- second backward ---------------------------------------------------------------------------------------


def penalty(critic: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


def after_the_scores(critic: Any, x: Tensor) -> Tensor:
    return critic(x).mean() - critic(x * 2).mean() + 10 * penalty(critic, x)


def before_the_scores(critic: Any, x: Tensor) -> Tensor:
    held = penalty(critic, x)
    return 10 * held + critic(x).mean()


def between_evaluations(critic: Any, x: Tensor) -> Tensor:
    held = penalty(critic, x)
    with torch.no_grad():
        critic(x * 3)
    return held + penalty(critic, x * 2)


def forces(critic: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    energy = critic(x)
    (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return energy.square().mean() + (force - 1).square().mean()


def before_a_part(critic: Any, x: Tensor) -> Tensor:
    held = penalty(critic, x)
    first = next(iter(critic.children()))
    # A forward of one unit gathers that unit anew, and must leave the others as they are.
    return held + first(x).mean() if first.weight.shape == (5, 3) and _is_callable(first) else held


def _is_callable(layer: Any) -> bool:
    """Return whether a layer can be called by itself: it is a unit, or nothing is sharded."""
    return hasattr(layer, "unshard") or not any(hasattr(p, "placements") for p in layer.parameters())


PENALTIES = (penalty, after_the_scores, before_the_scores, between_evaluations, forces, before_a_part)


def straight() -> nn.Module:
    """Return a model whose second backward passes through the output of no unit."""
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4), nn.Linear(4, 1))


def bent() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 1))


def gradient_penalties_train_as_one_process() -> None:
    whole_model = lambda: FSDPStrategy(wrap=lambda *_: False)  # noqa: E731
    for build in (straight, bent):
        for make in (*POLICIES.values(), whole_model):
            for loss in PENALTIES:
                runtime, model = start(make, build)
                expected = plain(build)
                optimizer = runtime.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.01))
                reference = torch.optim.SGD(expected.parameters(), lr=0.01)
                for step in range(2):
                    optimizer.zero_grad()
                    reference.zero_grad()
                    shares = batch(step).chunk(runtime.world_size)
                    (sum(loss(expected, share) for share in shares) / len(shares)).backward()
                    runtime.backward(loss(model, shares[runtime.global_rank]))
                    assert not gathered(model.module.named_parameters())
                    optimizer.step()
                    reference.step()
                same(model, expected)
                train(runtime, model)
                train_plain(expected)
                same(model, expected)


def a_graph_that_is_never_used_does_not_change_what_follows() -> None:
    for runtime, model in all_policies():
        expected = plain()
        penalty(model.eval(), batch())
        for parameter in (*model.parameters(), *expected.parameters()):
            parameter.data.mul_(0.5)
        with torch.no_grad():
            torch.testing.assert_close(model(batch()), expected.eval()(batch()))
        train(runtime, model)
        train_plain(expected)
        same(model, expected)
        assert not gathered(model.module.named_parameters())


# -- other uses --------------------------------------------------------------------------------------------


def the_dtype_may_change_after_a_forward() -> None:
    for runtime, model in all_policies():
        expected = plain()
        train(runtime, model)
        train_plain(expected)
        model.double()
        expected.double()
        # Not through the precision, which casts the input.
        output = model.module(batch().double())
        torch.testing.assert_close(output, expected(batch().double()), rtol=1e-4, atol=1e-5)
        output.square().mean().backward()
        assert model.stem.weight.grad.dtype == torch.float64


def training_goes_on_after_a_forward_that_failed() -> None:
    for runtime, model in all_policies():
        expected = plain()
        for step in range(2):
            with pytest.raises(RuntimeError):
                model(torch.zeros(4, 5))
            assert not gathered(model.module.named_parameters())
            train(runtime, model, step)
            train_plain(expected, step)
        same(model, expected)


def training_goes_on_after_a_backward_that_failed() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ZeroDivisionError

    class Failing(Model):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.blocks[1](self.blocks[0](Fails.apply(x) if self.fails else x))
            return self.head(torch.tanh(self.norm(x))) * self.temperature.exp()

    for make in POLICIES.values():
        runtime, model = start(make, Failing)
        expected = plain(Failing)
        model.fails = True
        with pytest.raises(ZeroDivisionError):
            runtime.backward(model(batch()).square().mean())
        expected.train()(batch())  # The running statistics have moved.
        model.fails = False
        model.zero_grad()
        train(runtime, model)
        train_plain(expected)
        same(model, expected)


def outputs_of_classes_that_fsdp_does_not_know_train_as_one_process() -> None:
    class Result:
        def __init__(self, value: Tensor) -> None:
            self.value = value

    class Hiding(nn.Module):
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Any:
            return Result(self.layer(x))

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleList([Hiding(), Hiding()])
            self.head = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            inner = self.inner[1](self.inner[0](x).value)
            return {"some": [Result(self.head(inner.value))], "text": "text"}

    for make in POLICIES.values():
        for build, find in (
            (Hiding, lambda output: output.value),
            (Around, lambda output: output["some"][0].value),
        ):
            runtime, model = start(make, build)
            expected = plain(build)
            for step in range(2):
                runtime.backward(find(model(batch(step))).square().mean())
                find(expected(batch(step))).square().mean().backward()
                same(model, expected, gradients=True)
                assert not gathered(model.module.named_parameters())
            with torch.no_grad():
                torch.testing.assert_close(find(model(batch())), find(expected(batch())))


def attributes_of_parameters_are_there_in_forward() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.layer.weight.factor = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.layer.weight.factor

    for make in POLICIES.values():
        _, model = start(make, Scaled)
        torch.testing.assert_close(model(batch()), plain(Scaled)(batch()))
        assert model.get_parameter("layer.weight").factor == 2.0


def shared_modules_and_parametrized_ones_train_as_one_process() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shared = nn.Linear(7, 7)
            self.stem = nn.utils.parametrizations.weight_norm(nn.Linear(3, 7))
            self.blocks = nn.ModuleList(nn.ModuleDict({"own": Block(7), "shared": shared}) for _ in range(2))
            self.layers = nn.ModuleList(Layer(shared) for _ in range(3))
            self.head = shared

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in (*self.layers, *(part for block in self.blocks for part in block.values())):
                x = torch.tanh(layer(x))
            return self.head(x)

    for name, make in POLICIES.items():
        if name == "another's":  # torch's `fully_shard` does not take a module that two units hold.
            continue
        runtime, model = start(make, Sharing)
        expected = plain(Sharing)
        train(runtime, model)
        train_plain(expected)
        same(model, expected)
        assert sum(parameter.dim() == 2 for parameter in model.parameters()) == 10


def sharded_parameters_outside_of_their_forward_are_named() -> None:
    _, model = start()
    with pytest.raises(
        UsageError,
        match=r"Model.score\(\) uses the parameters of stem, but they are sharded there.*"
        r"mark_forward_method\('score'\)",
    ):
        model.score(batch())

    class Reaches(Model):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.blocks[0].down.weight, self.stem(x))

        def shuffle(self) -> None:
            torch._is_all_true(self.stem.weight > 0)

    _, model = start(build=Reaches)
    with pytest.raises(UsageError, match=r"Reaches.forward\(\) uses parameters of the model.*wrap="):
        model(batch())
    with pytest.raises(UsageError, match=r"Reaches.shuffle\(\) .*no such operation.*inside `init_module`"):
        model.shuffle()


def gradients_that_cannot_be_exchanged_are_named() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 3))

        def forward(self, index: Tensor) -> Tensor:
            return nn.functional.embedding(index, self.table, sparse=True)

    runtime, model = start(build=Sparse)
    if ON_CPU:  # The simulated device has no sparse tensors.
        with pytest.raises(ConfigurationError, match="table would get sparse gradients"):
            runtime.backward(model(torch.tensor([1, 3])).sum())

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3).double().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).double())

    # Without the precision, which casts all parameters to one dtype.
    strategy = FSDPStrategy()
    strategy.connect(runtime.device, runtime.strategy.environment)
    model = strategy.setup(Mixed())
    strategy.backward(model(batch()).sum())
    model.second.requires_grad_(True)
    with pytest.raises(
        ConfigurationError, match=r"first.weight is torch.float32, the gradient of second.weight is torch.f"
    ):
        strategy.backward(model(batch()).sum())


def units_of_a_model_that_is_no_unit_are_roots() -> None:
    runtime, model = start(lambda: ByTorch(shards_root=False))
    reference = plain()
    with torch.no_grad():
        model.eval()(batch())
    assert not gathered(model.module.blocks.named_parameters())
    optimizer = runtime.setup_optimizers(torch.optim.SGD(model.train().parameters(), lr=0.1))
    plainly = torch.optim.SGD(reference.parameters(), lr=0.1)
    for step in range(2):
        runtime.backward((model(batch(step)) + model(batch(step + 5))).square().mean())
        (reference(batch(step)) + reference(batch(step + 5))).square().mean().backward()
        with pytest.raises(RuntimeError):
            model(batch()[:, :2])
        for each in (optimizer, plainly):
            each.step()
            each.zero_grad()
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), msg=name)


CHECKS = [
    units_of_a_model_that_is_no_unit_are_roots,
    after_an_evaluation_everyone_sees_the_shards,
    after_a_marked_method_without_gradients_everyone_sees_the_shards,
    a_look_before_the_backward_sees_shards_and_the_gradients_stay_right,
    a_single_rank_may_look_before_the_backward,
    a_look_before_the_backward_leaves_checkpointing_alone,
    freezing_before_the_backward_holds,
    a_change_of_gathered_parameters_does_not_make_them_the_models,
    weights_that_change_after_a_forward_without_backward_count_in_the_next_one,
    two_forwards_before_one_backward_are_right,
    training_is_right_in_any_order_with_inference_mode,
    a_part_may_run_first_and_in_inference_mode,
    gradient_penalties_train_as_one_process,
    a_graph_that_is_never_used_does_not_change_what_follows,
    the_dtype_may_change_after_a_forward,
    training_goes_on_after_a_forward_that_failed,
    training_goes_on_after_a_backward_that_failed,
    outputs_of_classes_that_fsdp_does_not_know_train_as_one_process,
    attributes_of_parameters_are_there_in_forward,
    shared_modules_and_parametrized_ones_train_as_one_process,
    sharded_parameters_outside_of_their_forward_are_named,
    gradients_that_cannot_be_exchanged_are_named,
]

if __name__ == "__main__":
    for check in CHECKS:
        check()
        sys.stdout.write(f"{check.__name__}\n")
