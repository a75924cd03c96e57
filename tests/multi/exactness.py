"""One column of the exactness matrix: every model of the zoo on one strategy, against eager construction.

Run by test_exactness.py, on one rank in the test's own process and on more under torchrun.
"""

from __future__ import annotations

import sys
from unittest.mock import patch

import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.strategies import DDPStrategy, FSDPStrategy
from nucleate.strategies.base import Strategy
from nucleate.strategies.single_device import SingleDeviceStrategy
from tests.deferred.equality import bits, named_tensors
from tests.multi.device import accelerator, device
from tests.zoo import ZOO, ConvNet

SEED = 4321
NUM_STEPS = 20


def make_strategy(name: str) -> Strategy:
    """Return the strategy of a column."""
    return {
        "single": SingleDeviceStrategy,
        "ddp": DDPStrategy,
        "fsdp": FSDPStrategy,
        "hsdp": lambda: FSDPStrategy(num_replicas=2),
        "fsdp-linear": lambda: FSDPStrategy(wrap=lambda name, module: type(module) is nn.Linear),
    }[name]()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_weights(strategy: str, name: str, empty_init: bool | None, precision: str = "32-true") -> None:
    """Assert that weights, buffers, ties and the random stream are eager's, though ranks are seeded differently."""
    make, _ = ZOO[name]
    runtime = Runtime(accelerator=accelerator(), strategy=make_strategy(strategy), precision=precision)
    torch.manual_seed(SEED)
    with runtime.precision.module_init_context():
        eager = make()
    after = torch.rand(7)
    torch.manual_seed(SEED + 1000 * runtime.global_rank)
    with runtime.init_module(empty_init=empty_init):
        model = make()
    runtime.setup(model)
    assert torch.equal(torch.rand(7), after), f"{name}: the random stream is elsewhere"
    expected, actual = named_tensors(eager), named_tensors(model)
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert tensor.dtype == actual[key].dtype, f"{name}: {key} is {actual[key].dtype}"
        assert tensor.requires_grad == actual[key].requires_grad
        assert bits(tensor) == bits(whole(actual[key])), f"{name}: {key} differs"
    for first in expected:
        for second in expected:
            assert (expected[first] is expected[second]) == (actual[first] is actual[second]), (first, second)


def train(strategy: str, name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train a model of the zoo on whole batches split over the ranks; return losses and final weights."""
    make, sample = ZOO[name]
    runtime = Runtime(accelerator=accelerator(), strategy=make_strategy(strategy))
    torch.manual_seed(SEED)
    with runtime.init_module(empty_init=True):
        model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped, optimizer = runtime.setup(model, optimizer)
    generator = torch.Generator(device()).manual_seed(7)
    losses = []
    for _ in range(NUM_STEPS):
        batch = sample(generator).chunk(runtime.world_size)[runtime.global_rank]
        output = wrapped(batch)
        output = output[0] if isinstance(output, tuple) else output
        loss = output.float().square().mean()
        runtime.backward(loss)
        runtime.clip_gradients(wrapped, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(runtime.all_reduce(loss.detach())))
    return losses, {key: whole(p).detach() for key, p in model.named_parameters()}


def main(strategy: str, trains: bool = True) -> None:
    """Check one column of the matrix: the weights, and by default also the losses of a training."""
    for name in ZOO:
        for empty_init in (True, False):
            check_weights(strategy, name, empty_init)
        with patch("nucleate.materialize.block.ONSET_NUMEL", 1):
            check_weights(strategy, name, None)
        check_weights(strategy, name, True, "bf16-true" if ZOO[name][0] is ConvNet else "64-true")
        make, _ = ZOO[name]
        if make is ConvNet or not trains:
            continue  # batch statistics depend on how a batch is split
        expected, weights = train_alone(name)
        losses, trained = train(strategy, name)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-5, atol=1e-6)
        for key, weight in weights.items():
            torch.testing.assert_close(trained[key], weight, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def train_alone(name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Train the same model by hand, eagerly, on the whole batch."""
    make, sample = ZOO[name]
    torch.manual_seed(SEED)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator(device()).manual_seed(7)
    losses = []
    for _ in range(NUM_STEPS):
        output = model(sample(generator))
        output = output[0] if isinstance(output, tuple) else output
        loss = output.float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {key: p.detach() for key, p in model.named_parameters()}


if __name__ == "__main__":
    main(sys.argv[1], trains=sys.argv[2] == "train")
