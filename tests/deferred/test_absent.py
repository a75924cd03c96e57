"""Models that are deferred for a device that this machine does not have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nucleate.deferred import deferred, handle_of
from nucleate.errors import DeferredUseError
from nucleate.materialize import Plan, materialize
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


class Mixed(nn.Module):
    """Factories of every kind, some of which name a device."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 3)
        nn.init.trunc_normal_(self.line.weight)
        self.norm = nn.LayerNorm(3, device="cuda")
        self.drawn = nn.Parameter(torch.randn(3, device=torch.device("cuda", 0)))
        self.register_buffer("table", torch.tensor([1.0, 2.0], device="cuda"))
        self.register_buffer("moved", torch.arange(3, device="cpu").cuda())
        self.register_buffer("also_moved", torch.ones(2, device="cpu").to("cuda", torch.float64))
        self.register_buffer("host", torch.zeros(2, device="cpu"))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def construct(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("cuda"), deferred("cuda"):
        return make()


@pytest.mark.parametrize("entered", ["before", "inside"])
def test_everything_that_is_made_for_it_is_recorded(entered: str) -> None:
    if entered == "before":
        model = construct(Mixed)
    else:
        with deferred("cuda:0"), torch.device("cuda"):
            model = Mixed()
    host = model.get_buffer("host")
    assert host.device.type == "cpu"
    assert torch.equal(host, torch.zeros(2))
    for name, tensor in tensors(model).items():
        if name != "host":
            assert handle_of(tensor) is not None, name
            assert tensor.device == torch.device("cuda", 0), name
            assert tensor.is_cuda, name
    assert model.get_buffer("also_moved").dtype == torch.float64
    assert model.get_buffer("moved").shape == (3,)


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@pytest.mark.parametrize("name", ["gpt", "transformer", "convnet", "lstm"])
def test_a_model_is_recorded_and_no_generator_moves(name: str) -> None:
    before = torch.get_rng_state()
    model = construct(ZOO[name][0])
    assert torch.equal(torch.get_rng_state(), before)
    assert Plan.of(model).size_bytes == sum(t.numel() * t.element_size() for t in tensors(model).values())


def test_its_fingerprint_tells_which_seed_it_was_constructed_with() -> None:
    digests = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        digests.append(Plan.of(construct(Mixed)).digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_value_that_the_constructor_reads_cannot_be_made() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = float(torch.rand(1, device="cuda"))

    before = torch.get_rng_state()
    with pytest.raises(DeferredUseError, match="'cuda:0', which this process does not have"):
        construct(Reads)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "look",
    [
        lambda: torch.tensor([1, 5]).tolist(),
        lambda: [value.item() for value in torch.linspace(0, 1, 4)],
        lambda: torch.randn(4, 5)[torch.arange(3)],
        lambda: nn.functional.embedding(torch.arange(3), torch.randn(4, 5)),
        lambda: nn.functional.dropout(torch.ones(4, 5)),
        lambda: torch.multinomial(torch.ones(5), 2),
        lambda: nn.init.sparse_(torch.empty(4, 5), 0.5),
        lambda: nn.init.orthogonal_(torch.empty(4, 4)),
        lambda: torch.arange(4)[torch.arange(4) > 1],
        lambda: torch.ones(3, device="cpu").new_tensor([1.0], device="cuda"),
        lambda: torch.empty(3, device=0),
    ],
)
def test_what_depends_on_no_random_number_is_looked_at_on_the_cpu(look: Callable[[], object]) -> None:
    before = torch.get_rng_state()
    with torch.device("cuda"), deferred("cuda"):
        seen = look()
    assert torch.equal(torch.get_rng_state(), before)
    if isinstance(seen, Tensor):
        assert seen.device == torch.device("cuda", 0)
    else:
        assert seen == look()


def test_it_cannot_be_made_there_nor_on_another_kind_of_device_and_stays_deferred() -> None:
    model = construct(Mixed)
    with pytest.raises(DeferredUseError, match="wanted on 'cuda:0', which this process does not have"):
        materialize(model, "cuda")
    with pytest.raises(DeferredUseError, match=r"line\.weight.* were constructed for 'cuda' and are wanted on 'cpu'"):
        materialize(model, "cpu")
    assert all(handle_of(t) is not None for name, t in tensors(model).items() if name != "host")


def test_what_is_recorded_for_it_and_loaded_from_elsewhere_is_made_here() -> None:
    with torch.device("cuda"), deferred("cuda"):
        model = nn.Linear(4, 3)
    state = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    model.load_state_dict(state)
    materialize(model, "cpu")
    assert torch.equal(model.weight, state["weight"])
    assert torch.equal(model.bias, state["bias"])


def test_patches_are_gone_afterwards() -> None:
    construct(Mixed)
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(1, device="cuda")
