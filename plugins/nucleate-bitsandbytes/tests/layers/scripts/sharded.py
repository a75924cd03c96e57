"""On several ranks: quantized layers under FSDP compute, train, save and load as in one process, bit for bit."""

from __future__ import annotations

import copy
import itertools
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from nucleate import Runtime
from nucleate.errors import UsageError
from nucleate.strategies import FSDPStrategy
from nucleate_bitsandbytes.layers import FourBitWeight, Linear4bit, Linear8bit, Linear8bitTraining

FORMATS = ("nf4", "nf4-dq", "fp4", "int8", "int8-training")


def quantized(fmt: str, columns: int, rows: int, dtype: torch.dtype) -> nn.Module:
    """Make a layer of random codes, by operations that can be deferred."""
    bias = nn.Parameter(torch.randn(rows).to(dtype))
    if fmt == "int8":
        codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return Linear8bit(columns, rows, codes, torch.rand(rows) + 0.5, bias)
    if fmt == "int8-training":
        return Linear8bitTraining(columns, rows, nn.Parameter(torch.randn(rows, columns).to(dtype)), bias)
    quant_type, _, nested = fmt.partition("-")
    numel = rows * columns
    num_blocks = -(-numel // 64)
    codes = torch.randint(0, 256, ((numel + 1) // 2, 1), dtype=torch.uint8)
    if not nested:
        weight = FourBitWeight(codes=codes, absmax=torch.rand(num_blocks) + 0.5, quant_type=quant_type)
    else:
        weight = FourBitWeight(
            codes=codes,
            absmax=torch.randint(0, 256, (num_blocks,), dtype=torch.uint8),
            quant_type=quant_type,
            nested_absmax=torch.rand(-(-num_blocks // 256)) * 0.1,
            offset=torch.ones(()),
        )
    return Linear4bit(columns, rows, weight, bias)


class Block(nn.Module):
    def __init__(self, fmt: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64).to(dtype)
        self.up = quantized(fmt, 64, 96, dtype)
        self.down = quantized(fmt, 96, 64, dtype)
        self.a = nn.Linear(64, 4, bias=False).to(dtype)
        self.b = nn.Linear(4, 64, bias=False).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * 0.01 + self.b(self.a(x))


class Model(nn.Module):
    def __init__(self, fmt: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(fmt, dtype) for _ in range(2))
        self.odd = quantized(fmt, 64, 31, dtype)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.odd(x)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Shard what torch itself only loads sharded: all but the tensors of quantized weights, which are given whole."""
    quantized = {n for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bit))}
    own = model.state_dict()
    return {
        name: distribute_tensor(tensor, own[name].device_mesh, own[name].placements)
        if isinstance(own.get(name), DTensor)
        and (name.rpartition(".")[0] not in quantized or name.endswith("bias"))
        and ".weight." not in name
        else tensor
        for name, tensor in state.items()
    }


def same_state(model: nn.Module, other: nn.Module) -> None:
    one, two = model.state_dict(), other.state_dict()
    assert list(one) == list(two)
    for name in one:
        assert torch.equal(whole(one[name]), two[name]), name


def start(fmt: str, dtype: torch.dtype, **options: object) -> tuple[nn.Module, nn.Module]:
    strategy = FSDPStrategy(wrap=[Block], **options)
    runtime = Runtime(accelerator="cpu", strategy=strategy)
    torch.manual_seed(0)
    expected = Model(fmt, dtype)
    torch.manual_seed(0)
    with runtime.init_module(empty_init=True):
        model = Model(fmt, dtype)
    assert "deferred" in repr(model.odd.weight)
    return strategy.setup(model), expected


def computes_as_one_process(fmt: str, dtype: torch.dtype, reshard: bool) -> None:
    model, expected = start(fmt, dtype, reshard_after_forward=reshard)
    for layer in (m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bit))):
        for name, parameter in layer.named_parameters():
            assert isinstance(parameter, DTensor), name
            assert parameter.requires_grad == (name == "bias")
    # A power of two: whether a multiplication and addition are rounded once depends on where a shard ends.
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=2**-10) for m in (model, expected)]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for step in range(2):
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(model.eval()(x), expected.eval()(x)), "eval"
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        y, wanted = model.train()(inputs[0]), expected.train()(inputs[1])
        assert torch.equal(y, wanted), "train"
        y.float().square().mean().backward()
        wanted.float().square().mean().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for (name, one), (_, two) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), name
            if one.grad is not None:
                assert torch.equal(whole(one.grad), two.grad), (step, name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert wanted.isfinite().all()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected.eval()(x)), f"eval after training {fmt} {reshard}"
        assert torch.equal(model.train()(x), expected.train()(x)), "train without gradients"
    same_state(model, expected)
    torch.manual_seed(7)
    other = Model(fmt, dtype)
    model.load_state_dict(sharded(copy.deepcopy(other.state_dict()), model))

    same_state(model, other)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x)), "eval after loading"


def quantizes_full_weights() -> None:
    for fmt in ("nf4", "nf4-dq", "int8"):
        model, expected = start(fmt, torch.bfloat16)
        generator = torch.Generator().manual_seed(2)
        state = expected.state_dict()
        for name in [name for name in state if ".weight." in name or name.endswith(("SCB", "weight_format"))]:
            del state[name]
        for name, module in expected.named_modules():
            if isinstance(module, (Linear4bit, Linear8bit)):
                shape = (module.out_features, module.in_features)
                state[f"{name}.weight"] = torch.randn(shape, generator=generator).bfloat16()
        model.load_state_dict(sharded(state, model))
        expected.load_state_dict(state)
        same_state(model, expected)


def refuses_what_it_cannot() -> None:
    model, _ = start("nf4", torch.bfloat16)
    before = {name: whole(t).clone() for name, t in model.state_dict().items()}
    _, other = start("nf4-dq", torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"blocks.0.up.weight .* nf4-dq with blocksize 64 there, and nf4 with"):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(whole(t), before[name]) for name, t in model.state_dict().items())
    with pytest.raises(UsageError, match="holds only a shard"):
        model.blocks[0].up(torch.randn(2, 64).bfloat16())
    with pytest.raises(UsageError, match="holds only a shard"):
        model.blocks[0].up.dequantize()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)
    for fmt in ("nf4", "int8"):
        model, _ = start(fmt, torch.float32, mixed_precision=policy)
        with pytest.raises(UsageError, match="mixed_precision"):
            model(torch.randn(2, 64).bfloat16())


part = sys.argv[1]
if part == "rest":
    quantizes_full_weights()
    refuses_what_it_cannot()
else:
    for fmt, reshard in itertools.product(FORMATS, (True, False)):
        computes_as_one_process(fmt, getattr(torch, part), reshard)
print("all hold")
