"""Constructors of every kind, deferred, equal eager ones bit for bit."""

from __future__ import annotations

import copy
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nucleate.deferred import deferred
from nucleate.materialize import materialize
from tests.deferred.equality import assert_exact, assert_same_model, bits

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(7, 5),
    "bilinear": lambda: nn.Bilinear(3, 4, 5),
    "embedding with padding": lambda: nn.Embedding(11, 3, padding_idx=2),
    "embedding bag": lambda: nn.EmbeddingBag(11, 3),
    "conv1d": lambda: nn.Conv1d(3, 5, 3),
    "conv2d channels last": lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last),
    "conv transpose": lambda: nn.ConvTranspose3d(3, 5, 2),
    "batch norm": lambda: nn.BatchNorm2d(5),
    "instance norm": lambda: nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "layer norm": lambda: nn.LayerNorm((3, 4)),
    "rms norm": lambda: nn.RMSNorm(6),
    "prelu": lambda: nn.PReLU(3),
    "lstm": lambda: nn.LSTM(5, 7, num_layers=2, bidirectional=True, proj_size=3),
    "gru": lambda: nn.GRU(5, 7),
    "rnn cell": lambda: nn.RNNCell(5, 7),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
    "transformer": lambda: nn.Transformer(16, 2, 2, 2, 32, batch_first=True),
    "adaptive softmax": lambda: nn.AdaptiveLogSoftmaxWithLoss(64, 20, cutoffs=[4, 10]),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_torch_layers_are_exact(make: Callable[[], nn.Module]) -> None:
    assert_exact(make)


INITIALIZERS: dict[str, Callable[[Tensor], Any]] = {
    "uniform": lambda t: nn.init.uniform_(t, -2, 3),
    "normal": lambda t: nn.init.normal_(t, 1, 2),
    "trunc_normal": lambda t: nn.init.trunc_normal_(t, std=0.02),
    "trunc_normal that rejects much": lambda t: nn.init.trunc_normal_(t, std=1.0, a=-0.1, b=0.1),
    "constant": lambda t: nn.init.constant_(t, 0.3),
    "eye": nn.init.eye_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
    "sparse": lambda t: nn.init.sparse_(t, 0.4),
    "exponential": lambda t: t.data.exponential_(),
    "bernoulli": lambda t: t.data.bernoulli_(0.3),
    "log_normal": lambda t: t.data.log_normal_(),
    "cauchy": lambda t: t.data.cauchy_(),
    "geometric": lambda t: t.data.geometric_(0.4),
    "random": lambda t: t.data.random_(3, 9),
    "own erfinv truncation": lambda t: t.data.uniform_(-0.9, 0.9).erfinv_().mul_(0.02).clamp_(-0.04, 0.04),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("initialize", INITIALIZERS.values(), ids=INITIALIZERS.keys())
def test_initializers_are_exact(initialize: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    if initialize is nn.init.orthogonal_ and dtype.itemsize == 2:
        pytest.skip("torch has no QR in half precision, eager fails as well")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # Odd sizes, and one below the 16 elements at which `normal_` draws in another way.
            self.small = nn.Parameter(torch.empty(3, 3, dtype=dtype))
            self.large = nn.Parameter(torch.empty(37, 29, dtype=dtype))
            for parameter in self.parameters():
                initialize(parameter)

    assert_exact(Model)


class _Recipe(nn.Module):
    """A module whose constructor runs the body of a test case on it."""

    def __init__(self, body: Callable[[nn.Module], None]) -> None:
        super().__init__()
        body(self)


IDIOMS: dict[str, Callable[[Any], None]] = {}


def idiom(body: Callable[[Any], None]) -> Callable[[Any], None]:
    IDIOMS[body.__name__.strip("_")] = body
    return body


@idiom
def _a_value_steers_the_constructor(m: Any) -> None:
    m.layer = nn.Linear(3 if torch.rand(1).item() > 0.5 else 4, 5)
    m.other = nn.Linear(2, 2) if bool(torch.randn(()) > 0) else nn.Linear(2, 3)


@idiom
def _computed_parameters(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(4, 4) / 3 + torch.eye(4))
    m.b = nn.Parameter(torch.linspace(0, 1, 7) ** 2)
    m.c = nn.Parameter(torch.stack([torch.arange(3.0), torch.rand(3)]))


@idiom
def _constants_of_all_sources(m: Any) -> None:
    m.a = nn.Parameter(torch.from_numpy(np.arange(6.0)))
    m.b = nn.Parameter(torch.tensor([1.0, 2.0]))
    m.register_buffer("c", torch.tensor([[1, 2], [3, 4]]))
    m.d = nn.Parameter(torch.as_tensor(np.ones((2, 2), dtype=np.float32)))


@idiom
def _data_assignment(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    m.a.data = torch.ones(2, 2)
    m.b = nn.Parameter(torch.randn(3))
    m.b.data = torch.from_numpy(np.full(4, 7.0, dtype=np.float32))
    m.c = nn.Parameter(torch.zeros(2))
    m.c.data = m.a.data * 2


@idiom
def _writes_through_views(m: Any) -> None:
    m.a = nn.Parameter(torch.empty(6, 4))
    with torch.no_grad():
        m.a[:2].normal_()
        m.a[2:].zero_()
        m.a[:, 1].fill_(5)
        m.a.t()[3].uniform_()
        m.a[m.a > 1] = 0.5
        m.a[torch.tensor([0, 3])] += 1


@idiom
def _ties_and_views(m: Any) -> None:
    m.a = nn.Linear(4, 4, bias=False)
    m.b = nn.Linear(4, 4, bias=False)
    m.b.weight = m.a.weight
    m.register_buffer("whole", torch.randn(8))
    m.register_buffer("part", m.whole[:4])


@idiom
def _a_last_pass_initializes_again(m: Any) -> None:
    m.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(4))
    for module in m.layers:
        module.weight.data.normal_(0, 0.02)
        nn.init.zeros_(module.bias)


@idiom
def _seeding_inside(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(20))
    torch.manual_seed(77)
    m.b = nn.Parameter(torch.randn(20))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        m.c = nn.Parameter(torch.randn(20))
    m.d = nn.Parameter(torch.randn(20))
    state = torch.get_rng_state()
    m.e = nn.Parameter(torch.rand(20))
    torch.set_rng_state(state)
    m.f = nn.Parameter(torch.rand(20))


@idiom
def _explicit_generators(m: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    m.a = nn.Parameter(torch.randn(20, generator=generator))
    m.b = nn.Parameter(torch.empty(20).uniform_(generator=generator))
    m.c = nn.Parameter(nn.init.trunc_normal_(torch.empty(30), generator=generator))
    m.d = nn.Parameter(torch.randn(4))


@idiom
def _copies(m: Any) -> None:
    m.a = nn.Linear(3, 4)
    m.b = copy.deepcopy(m.a)
    m.c = nn.Parameter(copy.deepcopy(m.a.weight))
    m.d = nn.Linear(3, 4)
    m.d.load_state_dict(m.a.state_dict())
    m.e = nn.Parameter(m.a.weight.detach().clone())
    with torch.no_grad():
        m.e.mul_(2)


@idiom
def _host_reads(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(5))
    m.b = nn.Parameter(torch.tensor(m.a.tolist()))
    m.c = nn.Parameter(torch.tensor([m.a[0].item(), float(m.a.data[1]), m.a.data[2]]))
    m.n = nn.Parameter(torch.zeros(int(m.a.abs().sum()) + 1))
    array = m.a.detach().numpy()
    array[0] = 42.0
    m.d = nn.Parameter(torch.from_numpy(np.sqrt(np.abs(array))))
    assert str(m.a)
    assert repr(m.a)


@idiom
def _data_dependent_shapes(m: Any) -> None:
    x = torch.randn(20)
    m.register_buffer("where", torch.nonzero(x > 0))
    m.register_buffer("kept", x[x > 0])
    m.register_buffer("unique", torch.unique(torch.randint(0, 5, (20,))))
    m.a = nn.Parameter(torch.randperm(9).float())


@idiom
def _real_tensors_take_deferred_values(m: Any) -> None:
    real = torch.tensor([0.0, 0.0, 0.0])
    real.copy_(torch.randn(3))
    m.a = nn.Parameter(real)
    real2 = torch.from_numpy(np.zeros(4, dtype=np.float32))
    real2.normal_()
    m.b = nn.Parameter(real2)
    m.c = nn.Parameter(torch.randn(4))
    m.d = nn.Parameter(torch.rand_like(real2))


@idiom
def _a_constant_edited_after_it_was_read(m: Any) -> None:
    large = torch.from_numpy(np.ones(400_000, dtype=np.float32))
    m.a = nn.Parameter(torch.zeros(400_000))
    m.a.data.copy_(large)
    large.mul_(3)
    m.b = nn.Parameter(torch.zeros(400_000))
    m.b.data.copy_(large)


@idiom
def _device_and_dtype_questions(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    assert not m.a.is_meta
    assert m.a.is_cpu
    assert m.a.device == torch.device("cpu")
    assert m.a.type() == "torch.FloatTensor"
    m.b = nn.Parameter(torch.zeros(3, device=m.a.device))
    m.b.data.cpu().add_(1)
    m.b.data.to("cpu").add_(1)
    m.b.data.to(m.a).add_(1)
    m.c = nn.Parameter(m.a.detach().to(torch.float64))
    m.d = nn.Parameter(m.a.detach().half())
    m.e = nn.Parameter(torch.tensor([1.0]).to(m.a.device))


@idiom
def _legacy_constructors(m: Any) -> None:
    m.a = nn.Parameter(torch.Tensor(3, 4).uniform_())
    m.b = nn.Parameter(torch.FloatTensor(2, 2).fill_(3))
    m.register_buffer("c", torch.LongTensor([1, 2, 3]))
    m.d = nn.Parameter(m.a.data.new(2, 2).normal_())


@idiom
def _weight_norms(m: Any) -> None:
    m.a = parametrizations.weight_norm(nn.Linear(5, 6))
    m.b = parametrizations.orthogonal(nn.Linear(5, 5))
    m.c = parametrizations.spectral_norm(nn.Linear(5, 6))
    m.d = nn.utils.spectral_norm(nn.Linear(5, 6))


@idiom
def _other_default_dtype(m: Any) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        m.a = nn.Linear(3, 3)
        m.b = nn.Parameter(torch.arange(4) / 3)
    finally:
        torch.set_default_dtype(default)
    m.c = nn.Parameter(torch.arange(4) / 3)


@idiom
def _complex_and_conjugates(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    m.b = nn.Parameter(torch.polar(torch.ones(3), torch.rand(3)))
    m.register_buffer("c", torch.view_as_real(m.a.data).clone())
    m.register_buffer("d", m.a.data.conj().clone())


@idiom
def _linear_algebra(m: Any) -> None:
    x = torch.randn(5, 5)
    m.a = nn.Parameter(torch.linalg.qr(x)[0])
    m.b = nn.Parameter(torch.linalg.svd(x).S)
    m.c = nn.Parameter(torch.linalg.inv(x))
    m.d = nn.Parameter(torch.geqrf(x)[0])


@idiom
def _python_and_numpy_randomness(m: Any) -> None:
    random.seed(0)
    np.random.seed(0)
    m.a = nn.Parameter(torch.full((random.randint(2, 5),), random.random()))
    m.b = nn.Parameter(torch.from_numpy(np.random.randn(4)))


@idiom
def _a_dry_run(m: Any) -> None:
    m.conv = nn.Conv2d(1, 3, 3)
    with torch.no_grad():
        size = m.conv(torch.zeros(1, 1, 8, 8)).numel()
        scale = m.conv(torch.randn(1, 1, 8, 8)).std()
    m.head = nn.Linear(size, 2)
    m.scale = nn.Parameter(scale.clone())
    m.lazy = nn.LazyLinear(3)
    m.lazy(torch.ones(2, 6))


@idiom
def _frozen_and_inplace(m: Any) -> None:
    m.a = nn.Linear(4, 4)
    m.a.requires_grad_(False)
    m.a.weight.mul_(0.5)
    m.b = nn.Parameter(torch.zeros(3), requires_grad=False)
    torch.nn.init.normal_(m.b)


@idiom
def _a_custom_parameter_class(m: Any) -> None:
    m.a = _Marked(torch.randn(3))
    m.a.decay = False


class _Marked(nn.Parameter):
    pass


@idiom
def _a_dummy_forward_through_batch_norm(m: Any) -> None:
    m.net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.InstanceNorm2d(3, track_running_stats=True))
    with torch.no_grad():
        m.net(torch.rand(2, 1, 6, 6))


@idiom
def _copies_and_files_with_real_tensors(m: Any) -> None:
    m.teacher = copy.deepcopy(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    file = io.BytesIO()
    torch.save({"weight": torch.from_numpy(np.arange(6.0)), "bias": torch.tensor([1.0])}, file)
    file.seek(0)
    loaded = torch.load(file)
    m.weight = nn.Parameter(loaded["weight"] * 2)
    m.bias = nn.Parameter(loaded["bias"])


@idiom
def _sparse_buffers(m: Any) -> None:
    m.register_buffer("dense", (torch.eye(4) * torch.rand(4)).to_sparse().to_dense())
    m.sparse = torch.eye(4).to_sparse()
    m.new = nn.Parameter(torch.rand(2).new_tensor([1.0, 2.0]))


@idiom
def _inference_mode(m: Any) -> None:
    with torch.inference_mode():
        table = nn.init.trunc_normal_(torch.empty(20))
    m.register_buffer("table", table.clone())


@idiom
def _zero_sizes_and_scalars(m: Any) -> None:
    m.a = nn.Parameter(torch.empty(0))
    m.b = nn.Parameter(torch.tensor(1.5))
    m.c = nn.Parameter(torch.ones(()))
    m.d = nn.Parameter(torch.randn(0, 3))


@idiom
def _functional_use(m: Any) -> None:
    m.a = nn.Linear(4, 4)
    target = F.normalize(torch.randn(4, 4), dim=0)
    loss = (m.a.weight - target).square().sum()
    (gradient,) = torch.autograd.grad(loss, m.a.weight)
    with torch.no_grad():
        m.a.weight.sub_(gradient, alpha=0.1)


@pytest.mark.parametrize("body", IDIOMS.values(), ids=IDIOMS.keys())
def test_constructor_idioms_are_exact(body: Callable[[nn.Module], None]) -> None:
    assert_exact(lambda: _Recipe(body))


def test_nothing_is_allocated_while_a_model_is_constructed() -> None:
    with deferred():
        # 4 TB, far more than any machine that runs this has.
        model = nn.ParameterList(nn.Parameter(torch.zeros(100_000, 10_000)) for _ in range(1000))
    assert sum(p.numel() for p in model.parameters()) == 10**12


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_tensors_in_plain_attributes_are_made_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.randn(3)
            self.several = [torch.ones(2), {"deep": torch.rand(2)}]
            self.layer = nn.utils.weight_norm(nn.Linear(3, 4))

    torch.manual_seed(0)
    eager = Model()
    torch.manual_seed(0)
    with deferred():
        model = Model()
    materialize(model)
    assert_same_model(eager, model)
    assert bits(eager.scale) == bits(model.scale)
    assert bits(eager.several[0]) == bits(model.several[0])
    assert bits(eager.several[1]["deep"]) == bits(model.several[1]["deep"])
    assert bits(eager.layer.weight) == bits(model.layer.weight)
    model.layer(torch.ones(1, 3)).sum().backward()
    assert model.layer.weight_v.grad is not None


def test_a_model_that_is_a_copy_is_made_like_any_other() -> None:
    assert_exact(lambda: copy.deepcopy(nn.Linear(3, 3)))


def test_tensors_in_objects_and_cycles_are_made_too() -> None:
    @dataclass
    class Cache:
        keys: Tensor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.space = SimpleNamespace(x=torch.rand(2))
            self.ordered = OrderedDict(x=torch.rand(2))
            self.cache = Cache(torch.rand(2))
            self.cycle: dict[str, Any] = {"x": torch.rand(2)}
            self.cycle["self"] = self.cycle

    torch.manual_seed(0)
    eager = Model()
    torch.manual_seed(0)
    with deferred():
        model = Model()
    materialize(model)
    for get in (lambda m: m.space.x, lambda m: m.ordered["x"], lambda m: m.cache.keys, lambda m: m.cycle["x"]):
        assert bits(get(eager)) == bits(get(model))


def test_a_tensor_the_user_puts_on_meta_stays_there() -> None:
    with deferred():
        shape_only = torch.empty(3, device="meta")
        under_context = torch.device("meta")
        with under_context:
            module = nn.Linear(2, 2)
    assert shape_only.is_meta
    assert module.weight.is_meta


def test_lstm_weights_work_after_materialization() -> None:
    model = assert_exact(lambda: nn.LSTM(3, 4))
    output, _ = model(torch.ones(2, 1, 3))
    output.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(a is b for a, b in zip(model._flat_weights, model.parameters(), strict=True))
