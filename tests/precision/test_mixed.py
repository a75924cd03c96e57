"""`bf16-mixed` and `16-mixed`: autocast, and the gradient scale of float16."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nucleate.accelerators import CPUAccelerator
from nucleate.cluster import Environment
from nucleate.errors import ConfigurationError, UsageError
from nucleate.plugin import Composition
from nucleate.precision import MixedPrecision
from tests.device import ACCELERATOR, device

pytestmark = pytest.mark.usefixtures("factories_on_device")


def composition(precision: MixedPrecision, place: torch.device | None = None) -> Composition:
    return Composition(CPUAccelerator(), precision, CPUAccelerator(), Environment(), place or device())


def fp16(**options: float) -> MixedPrecision:
    return MixedPrecision(torch.float16, scaler=torch.amp.GradScaler(ACCELERATOR, **options))  # type: ignore[arg-type]


def backward(precision: MixedPrecision, model: nn.Module, factor: float = 1.0) -> None:
    with precision.forward_context():
        loss = model(torch.ones(1, 2)).sum() * factor
    precision.scale(precision.convert_output(loss)).backward()


@pytest.mark.parametrize(("name", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)])
def test_parameters_stay_in_float32_and_forward_computes_in_half(name: str, dtype: torch.dtype) -> None:
    precision = MixedPrecision.from_name(name)
    precision.check(composition(precision))
    assert precision.name == name
    assert precision.dtype == torch.float32
    model = precision.setup(nn.Linear(2, 2).to(torch.bfloat16))
    assert model.weight.dtype == torch.float32
    with precision.forward_context():
        output = model(precision.convert_input(torch.ones(1, 2, dtype=torch.float64)))
    assert output.dtype == dtype
    assert precision.convert_output(output).dtype == torch.float32


def test_only_float16_scales() -> None:
    assert not MixedPrecision().scales_gradients
    assert MixedPrecision().scaler is None
    assert MixedPrecision().state_dict() == {}
    loss = torch.ones(())
    assert MixedPrecision().scale(loss) is loss
    assert MixedPrecision(torch.float16).scales_gradients


def test_the_step_is_that_of_true_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    twin = copy.deepcopy(model)
    precision = fp16(init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(precision, model)
    assert model.weight.grad is not None
    assert model.weight.grad[0, 0] == 1024
    precision.unscale(optimizer)
    precision.unscale(optimizer)  # Clipping by norm and then by value asks twice.
    assert model.weight.grad[0, 0] == 1
    precision.step(optimizer)
    twin(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert torch.equal(model.weight, twin.weight)


def test_an_overflow_skips_the_step_and_lowers_the_scale_at_the_next_backward() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    precision = fp16(init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(precision, model, factor=float("inf"))
    assert precision.step(optimizer) is None
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()
    backward(precision, model)
    assert model.weight.grad is not None
    assert model.weight.grad[0, 0] == 512
    precision.step(optimizer)
    assert not torch.equal(model.weight, before)


def test_two_optimizers_see_the_scale_of_their_common_backward() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    precision = fp16(init_scale=1024.0)
    optimizers = [torch.optim.SGD(part.parameters(), lr=1.0) for part in (first, second)]
    backward(precision, nn.Sequential(first, second))
    assert first.weight.grad is not None
    first.weight.grad.fill_(float("inf"))
    before, gradient = second.weight.clone(), second.weight.grad
    assert gradient is not None
    expected = before - gradient / 1024
    precision.unscale(optimizers[1])
    precision.step(optimizers[0])  # Skipped; this must not change what the second one divides by.
    precision.step(optimizers[1])
    torch.testing.assert_close(second.weight, expected)


def test_a_backward_between_unscale_and_step_is_refused() -> None:
    model = nn.Linear(2, 2)
    precision = fp16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(precision, model)
    precision.unscale(optimizer)
    backward(precision, model)
    with pytest.raises(UsageError, match="another backward ran, so they mix two scales"):
        precision.step(optimizer)


def test_a_step_without_a_scaled_backward_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fp16().step(optimizer)  # Without gradients a step does nothing.
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(UsageError, match=r"no loss went through runtime.backward"):
        fp16().step(optimizer)


def test_a_closure_is_refused_where_gradients_are_scaled() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(UsageError, match=r"optimizer.step\(closure\) does not work with precision '16-mixed'"):
        fp16().step(optimizer, lambda: 0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(1, 2)).pow(2).sum()
        loss.backward()
        return loss

    assert MixedPrecision().step(optimizer, closure) > 0


def test_the_scale_is_saved_and_restored_also_by_pickle() -> None:
    model = nn.Linear(2, 2)
    precision = fp16(init_scale=1024.0)
    backward(precision, model, factor=float("inf"))
    precision.step(torch.optim.SGD(model.parameters(), lr=0.1))
    state = precision.state_dict()
    assert state["scale"] == 512
    other = MixedPrecision(torch.float16)
    other.load_state_dict(state)
    assert other.scale(torch.ones(())).item() == 512
    assert pickle.loads(pickle.dumps(precision)).scale(torch.ones(())).item() == 512
    MixedPrecision().load_state_dict(state)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not torch.float32"):
        MixedPrecision(torch.float32)
    with pytest.raises(ConfigurationError, match="leave the scaler out"):
        MixedPrecision(scaler=torch.amp.GradScaler(ACCELERATOR))
    with pytest.raises(ConfigurationError, match="no variant '32-mixed'"):
        MixedPrecision.from_name("32-mixed")
    cuda = MixedPrecision(device_type="cuda")
    with pytest.raises(ConfigurationError, match="device_type='cuda'"):
        cuda.check(composition(cuda))
    precision = MixedPrecision()
    with pytest.raises(ConfigurationError, match="no autocast for 'meta'"):
        precision.check(composition(precision, torch.device("meta")))


def test_complex_parameters_that_train_are_refused_where_gradients_are_scaled() -> None:
    model = nn.ParameterDict({"waves": torch.ones(2, dtype=torch.complex64), "plain": torch.ones(2).bfloat16()})
    with pytest.raises(ConfigurationError, match="'16-mixed' scales gradients.*: waves. Use 'bf16-mixed'"):
        fp16().setup(model)
    assert model["plain"].dtype == torch.bfloat16, "it was changed"
    model["waves"].requires_grad_(False)
    fp16().setup(model)
    MixedPrecision().setup(nn.ParameterDict({"waves": torch.ones(2, dtype=torch.complex64)}))


def test_torch_cannot_unscale_complex_gradients() -> None:
    """The fact that the refusal rests on."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    precision = fp16()
    precision.scale((weight * weight.conj()).real.sum()).backward()
    with pytest.raises(NotImplementedError, match="ComplexFloat"):
        precision.unscale(torch.optim.SGD([weight], lr=0.1))
