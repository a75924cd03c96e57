"""`torch.compile` before `setup`, after it, and on parts of the model: forward runs compiled, all else is the same."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate.wrappers import ModuleWrapper

# torch looks at the gradient of each input of a compiled part, and warns of its own look.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Counting:
    """A backend that counts the graphs that it compiles, and their calls."""

    def __init__(self) -> None:
        self.num_graphs = 0
        self.num_calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.num_graphs += 1

        def run(*args: Any) -> Any:
            self.num_calls += 1
            return graph.forward(*args)

        return run


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))


def runtime(precision: str = "32-true") -> Runtime:
    return Runtime(accelerator="cpu", strategy="single_device", precision=precision)


DATA = torch.linspace(-1, 1, 6).view(2, 3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("empty_init", [True, False])
def test_a_compiled_model_runs_compiled_and_gives_the_same(empty_init: bool, precision: str) -> None:
    backend, plain = Counting(), runtime(precision)
    expected = plain.setup(build())(DATA)
    with plain.init_module(empty_init=empty_init):
        model = build()
    wrapper = plain.setup(torch.compile(model, backend=backend))
    assert isinstance(wrapper, ModuleWrapper)
    assert wrapper.module is model
    for _ in range(2):
        output = wrapper(DATA)
        assert torch.equal(output, expected)
    output.sum().backward()
    assert wrapper.module[0].weight.grad is not None
    assert (backend.num_graphs, backend.num_calls) == (1, 2)


def test_a_deferred_model_may_be_compiled_inside_the_block() -> None:
    backend, plain = Counting(), runtime()
    expected = plain.setup(build())(DATA)
    with plain.init_module(empty_init=True):
        model = torch.compile(build(), backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper, optimizer = plain.setup(model, optimizer)
    assert torch.equal(wrapper(DATA), expected)
    plain.backward(wrapper(DATA).sum())
    before = wrapper[0].weight.clone()
    optimizer.step()
    assert not torch.equal(before, wrapper[0].weight)
    assert backend.num_graphs == 1
    assert list(wrapper.state_dict()) == list(build().state_dict())


def test_hooks_on_the_compiled_module_still_run() -> None:
    model: Any = torch.compile(build(), backend="eager")
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    runtime().setup(model)(DATA)
    assert seen == ["before", "after"]


def test_a_copy_runs_its_own_weights_compiled() -> None:
    backend = Counting()
    wrapper = runtime().setup(torch.compile(build(), backend=backend))
    wrapper(DATA)
    clone = copy.deepcopy(wrapper)
    with torch.no_grad():
        clone[2].weight.zero_()
        clone[2].bias.zero_()
    assert torch.equal(clone(DATA), torch.zeros(2, 1))
    assert not torch.equal(wrapper(DATA), torch.zeros(2, 1))
    assert backend.num_calls == 3


def test_a_copy_of_a_wrapper_that_was_compiled_in_place_has_its_own_weights() -> None:
    wrapper = runtime().setup(build())
    wrapper.compile(backend="eager")
    wrapper(DATA)
    for clone in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        with torch.no_grad():
            clone[2].weight.zero_()
            clone[2].bias.zero_()
        assert torch.equal(clone(DATA), torch.zeros(2, 1))


def test_a_pickled_model_is_not_compiled() -> None:
    backend = Counting()
    wrapper = runtime().setup(torch.compile(build(), backend=backend))
    clone = pickle.loads(pickle.dumps(wrapper))
    assert torch.equal(clone(DATA), wrapper(DATA))
    assert backend.num_calls == 1


def test_a_set_up_model_may_be_compiled() -> None:
    backend, plain = Counting(), runtime()
    wrapper = plain.setup(build())
    compiled: Any = torch.compile(wrapper, backend=backend)
    for _ in range(3):
        assert torch.equal(compiled(DATA), build()(DATA))
    assert backend.num_graphs == 1
    assert backend.num_calls == 3
    optimizer = plain.setup_optimizers(torch.optim.SGD(compiled.parameters(), 0.1))
    with plain.no_backward_sync(compiled):
        plain.backward(compiled(DATA).sum())
    assert plain.clip_gradients(compiled, optimizer, max_norm=1.0) is not None
    optimizer.step()


def test_a_compiled_part_stays_compiled_and_a_part_may_be_compiled_later() -> None:
    backend = Counting()
    model = build()
    model[0] = torch.compile(model[0], backend=backend)
    wrapper = runtime().setup(model)
    assert torch.equal(wrapper(DATA), build()(DATA))
    assert backend.num_calls == 1
    wrapper[2] = torch.compile(wrapper[2], backend=backend)
    assert torch.equal(wrapper(DATA), build()(DATA))
    assert backend.num_calls == 3


def test_a_part_that_a_precision_replaces_is_compiled_anew() -> None:
    class Doubled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    from nucleate.precision import FullPrecision

    def setup(model: nn.Module) -> nn.Module:
        model[0] = Doubled(model[0])
        return model

    precision = FullPrecision()
    precision.setup = setup  # type: ignore[method-assign]
    backend = Counting()
    model = nn.Sequential(torch.compile(nn.Linear(3, 3), backend=backend))
    expected = 2 * model[0]._orig_mod(DATA)
    wrapper = Runtime(accelerator="cpu", strategy="single_device", precision=precision).setup(model)
    assert torch.equal(wrapper(DATA), expected)
    assert backend.num_calls == 1


def test_a_compiled_model_is_set_up_once() -> None:
    plain = runtime()
    wrapper = plain.setup(torch.compile(build(), backend="eager"))
    for again in (wrapper, torch.compile(wrapper, backend="eager"), torch.compile(wrapper.module, backend="eager")):
        with pytest.raises(UsageError, match="this Sequential has been set up already"):
            plain.setup(again)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no_backward_sync takes the model that `setup` returned, not Sequential"):
        with plain.no_backward_sync(torch.compile(build(), backend="eager")):  # type: ignore[arg-type]
            pass


def test_a_compiled_model_is_freed() -> None:
    plain = runtime()
    wrapper = plain.setup(torch.compile(build(), backend="eager"))
    wrapper(DATA).sum().backward()
    gone = weakref.ref(wrapper.module)
    del wrapper
    gc.collect()
    assert gone() is None
