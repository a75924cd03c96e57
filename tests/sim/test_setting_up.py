"""What `setup` moves to a device: real models, models recorded for the CPU, and what verification sees of the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nucleate import Runtime
from nucleate.deferred import deferred
from nucleate.devices import Staging, staging
from nucleate.errors import DeferredUseError, VerificationError
from nucleate.materialize import verification
from tests.multi.ranks import run_ranks
from tests.sim.test_staging import BUFFER_BYTES, Copies, same

SIM = torch.device("sim", 0)


@pytest.fixture
def copies(sim: Any) -> Copies:
    return Copies(sim)


@pytest.fixture
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "BUFFER_BYTES", BUFFER_BYTES)


class Net(nn.Module):
    """Ties, a storage that two tensors share, dtypes, sizes on both sides of a buffer's, an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 300)
        self.head = nn.Linear(300, 101)
        self.head.weight = self.embedding.weight
        self.norms = nn.Sequential(*(nn.BatchNorm1d(7) for _ in range(30)))
        whole = torch.randn(60, 70)
        self.whole, self.turned = nn.Parameter(whole), nn.Parameter(whole.t()[3:])
        self.register_buffer("bytes", torch.arange(31, dtype=torch.int8))
        self.empty = nn.Parameter(torch.empty(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.embedding(x))
        return result


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def size_of(model: nn.Module) -> int:
    """Return the bytes of all storages and gradients, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return sum(storages.values()) + sum(gradient.numel() * gradient.element_size() for gradient in gradients)


@pytest.mark.usefixtures("_small_buffers")
def test_each_byte_of_a_real_model_crosses_once_from_pinned_memory(copies: Copies) -> None:
    model = Net()
    model(torch.arange(9)).sum().backward()
    model.whole.grad = torch.randn(70, 60).t()
    model.head.bias.grad = torch.ones(()).expand(101)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    expected, total, tensors = values(model), size_of(model), dict(model.named_parameters(remove_duplicate=False))
    copies.reset()
    Runtime(accelerator="sim").setup(model)
    assert (copies.size_bytes, copies.pageable_bytes) == (total, 0)
    assert copies.num_late >= copies.number, "copies do not block"
    for name, value in model.state_dict().items():
        assert value.device == SIM
        assert same(value, expected[name]), name
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in gradients)
        if parameter.grad is not None:
            assert same(parameter.grad, gradients[name]), name
    assert model.whole.grad.stride() == (1, 60)
    assert dict(model.named_parameters(remove_duplicate=False)).keys() == tensors.keys()
    assert all(now is tensors[name] for name, now in model.named_parameters(remove_duplicate=False))
    assert model.whole.untyped_storage()._cdata == model.turned.untyped_storage()._cdata


@pytest.mark.usefixtures("_small_buffers")
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_tensors_in_the_pages_of_a_file_cross_once_from_pinned_memory(
    tmp_path: Path, suffix: str, copies: Copies
) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200), nn.Linear(200, 5))

    expected = values(make())
    path = tmp_path / f"m.{suffix}"
    if suffix == "pt":
        torch.save(expected, path)
    else:
        save_file(expected, path)
    model = make()
    model.load_state_dict(torch.load(path, mmap=True) if suffix == "pt" else load_file(path), assign=True)
    total = size_of(model)
    copies.reset()
    Runtime(accelerator="sim").setup(model)
    assert all(same(value, expected[name]) for name, value in model.state_dict().items())
    assert (copies.size_bytes, copies.pageable_bytes) == (total, 0)


def test_moving_a_model_makes_one_ring_and_small_tensors_share_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[Staging] = []
    original = Staging.buffer
    monkeypatch.setattr(Staging, "buffer", lambda self: turns.append(self) or original(self))
    Runtime(accelerator="sim").setup(Net())
    assert len(turns) == 1


def test_a_gradient_that_can_be_differentiated_keeps_its_graph() -> None:
    model = nn.Linear(3, 3, bias=False)
    scale = torch.ones(3, 3, requires_grad=True)
    model.weight.grad = torch.ones(3, 3)
    model.weight.grad = model.weight.grad * scale
    Runtime(accelerator="sim").setup(model)
    assert model.weight.grad is not None
    model.weight.grad.sum().backward()
    assert same(scale.grad, torch.ones(3, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_model_that_was_recorded_for_the_cpu_is_made_there_and_moved(
    strategy: str, precision: str, copies: Copies
) -> None:
    def make() -> nn.Module:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 40, bias=False), nn.GRU(40, 4))
        nn.init.orthogonal_(model[2].weight)
        return model

    runtime = Runtime(accelerator="sim", strategy=strategy, precision=precision, verify="all")
    expected = values(make())
    with deferred("cpu"):
        model = make()
    real = model[1]
    real.register_buffer("real", torch.arange(3))
    expected["1.real"] = real.real.clone()
    copies.reset()
    runtime.setup(model)
    assert copies.pageable_bytes == 0
    for name, value in model.state_dict().items():
        found = value.full_tensor() if isinstance(value, DTensor) else value
        wanted = expected[name]
        assert found.device == SIM, name
        assert same(found, wanted.to(runtime.precision.dtype) if wanted.is_floating_point() else wanted), name


def test_ranks_set_up_models_that_were_recorded_for_the_cpu(tmp_path: Path) -> None:
    output = run_ranks("tests.sim.scripts.recorded_for_cpu", 2, tmp_path, timeout=240).stdout
    assert output.count("done") == 2


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp"])
def test_a_model_that_was_recorded_for_a_device_is_refused_on_the_cpu_by_name(strategy: str) -> None:
    with torch.device(SIM), deferred(SIM):
        model = nn.Linear(3, 3)
    with pytest.raises(DeferredUseError, match=r"weight, bias were constructed for 'sim' and are wanted on 'cpu'"):
        Runtime(accelerator="cpu", strategy=strategy).setup(model)
    assert same(Runtime(accelerator="sim", strategy="single_device").setup(model).module.weight, model.weight)


@pytest.mark.parametrize("verify", [True, "all"])
@pytest.mark.parametrize("is_large", [False, True])
def test_verification_sees_a_fault_on_the_way_of_a_loaded_value(
    verify: Any, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Staging.send

    def send(self: Staging, host: Tensor, out: Tensor) -> None:
        host.view(-1)[0] += 1
        original(self, host, out)

    if is_large:
        monkeypatch.setattr(verification, "SAMPLE_NUMEL", 1000)
    runtime = Runtime(accelerator="sim", verify=verify)

    def set_up() -> None:
        with runtime.init_module(empty_init=True):
            model = nn.Linear(50, 40, bias=False)
        model.load_state_dict({"weight": torch.randn(40, 50)})
        runtime.setup(model)

    set_up()
    monkeypatch.setattr(Staging, "send", send)
    with pytest.raises(VerificationError, match=r"weight on rank 0 differs from its recipe: element \(0, 0\)"):
        set_up()
