"""Constructors that change dtypes, devices and modes, and legacy ways to make tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def the_default_dtype_is_changed(m: Any) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        m.a = nn.Linear(3, 3)
        m.b = nn.Parameter(torch.arange(4) / 3)
        m.c = nn.Parameter(torch.tensor([1.0]))
        m.d = nn.Parameter(torch.Tensor(3).fill_(2))
        torch.set_default_dtype(torch.bfloat16)
        m.e = nn.Linear(3, 3)
        m.f = nn.Parameter(torch.tensor(1.5) + torch.rand(3))
        m.g = nn.Parameter(nn.init.trunc_normal_(torch.empty(30)))
    finally:
        torch.set_default_dtype(default)
    m.h = nn.Parameter(torch.arange(4) / 3)


@idiom.on_host("it sets the default device, inside of which the other one is entered")
def devices_are_entered(m: Any) -> None:
    with torch.device("cpu"):
        m.a = nn.Linear(3, 3)
        hold(
            m,
            x=torch.tensor([1, 2]),
            y=torch.arange(3),
            z=torch.rand(2),
            s=torch.Tensor([1.0]),
            t=torch.zeros(2).device.type == "cpu",
        )
    before = torch.get_default_device()
    torch.set_default_device("cpu")
    try:
        m.b = nn.Linear(3, 3)
    finally:
        torch.set_default_device(None if before.type == "cpu" else before)
    m.c = nn.Linear(2, 2, device="cpu", dtype=torch.float64)


@idiom
def the_meta_device_is_used_for_shapes(m: Any) -> None:
    with torch.device("meta"):
        shape = nn.Conv2d(1, 2, 3)(torch.empty(1, 1, 5, 5)).shape
    m.a = nn.Parameter(torch.rand(shape))
    other = nn.Linear(3, 4).to("meta")
    assert other.weight.is_meta
    assert other.weight.device.type == "meta"
    m.b = nn.Parameter(torch.rand_like(other.weight, device="cpu"))
    m.c = nn.Parameter(torch.zeros(torch.empty(3, 2, device="meta").shape))
    m.d = nn.Parameter(torch.empty_like(torch.empty(2, device="meta"), device="cpu").fill_(1))


@idiom
def gradients_are_off_or_inferred(m: Any) -> None:
    with torch.inference_mode():
        table = nn.init.trunc_normal_(torch.empty(20))
        other = torch.rand(3) * 2
        layer = nn.Linear(2, 2)
    m.register_buffer("table", table.clone())
    m.a = nn.Parameter(other.clone())
    m.b = nn.Parameter(layer.weight.clone().detach())
    with torch.no_grad():
        m.c = nn.Linear(2, 2)
        m.d = nn.Parameter(m.c.weight * 2)
    with torch.enable_grad():
        m.e = nn.Parameter((m.d * 2).detach())


@idiom
def autocast_is_on(m: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m.a = nn.Linear(3, 3)
        x = m.a(torch.rand(2, 3))
        m.b = nn.Parameter(x.detach())
        m.c = nn.Parameter(torch.rand(3, 3) @ torch.rand(3, 3))
        m.d = nn.Parameter(nn.functional.softmax(x.detach(), -1))
    m.e = nn.Parameter(m.a(torch.rand(2, 3)).detach())


@idiom
def device_and_dtype_are_asked_for(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    assert not m.a.is_meta
    assert m.a.is_cpu
    assert m.a.device == torch.device("cpu")
    assert m.a.type() == "torch.FloatTensor"
    assert m.a.data.get_device() == -1
    assert str(m.a.device) == "cpu"
    assert m.a.untyped_storage().device.type == "cpu"
    m.b = nn.Parameter(torch.zeros(3, device=m.a.device))
    m.b.data.cpu().add_(1)
    m.b.data.to("cpu").add_(1)
    m.b.data.to(m.a).add_(1)
    m.c = nn.Parameter(m.a.detach().to(torch.float64))
    m.d = nn.Parameter(m.a.detach().half())
    m.e = nn.Parameter(torch.tensor([1.0]).to(m.a.device))
    m.f = nn.Parameter(m.a.new_zeros(2, device="cpu"))
    m.g = nn.Parameter(torch.zeros_like(m.a, device=m.a.device).fill_(2))
    generator = torch.Generator(device=m.a.device).manual_seed(2)
    m.h = nn.Parameter(torch.rand(2, generator=generator, device=m.a.device))
    torch._assert(next(m.parameters()).device.type == "cpu", "cpu")
    assert torch.device(m.a.device.type, m.a.device.index or 0).type == "cpu"


@idiom
def tensors_are_made_by_legacy_constructors(m: Any) -> None:
    m.a = nn.Parameter(torch.Tensor(3, 4).uniform_())
    m.b = nn.Parameter(torch.FloatTensor(2, 2).fill_(3))
    hold(
        m,
        c=torch.LongTensor([1, 2, 3]),
        e=torch.Tensor([1.5, 2]),
        f=torch.HalfTensor(2).fill_(1),
        g=torch.DoubleTensor([[1, 2]]),
    )
    m.d = nn.Parameter(m.a.data.new(2, 2).normal_())
    m.h = nn.Parameter(torch.Tensor(m.a.data))
    m.i = nn.Parameter(m.a.data.new([1.0, 2.0]))
    m.j = nn.Parameter(torch.Tensor(torch.Size([2, 3])).zero_())
    m.k = nn.Parameter(torch.FloatTensor(m.a.data.shape).normal_())
    hold(
        m,
        l=torch.BoolTensor([True, False]),
        n=torch.ByteTensor(3).fill_(7),
        o=torch.IntTensor([1]),
        p=torch.Tensor().numel(),
    )
    m.q = nn.Parameter(m.a.data.new(m.b.data))
    m.r = nn.Parameter(m.a.data.new().resize_(2).fill_(1))
    m.s = nn.Parameter(torch.Tensor(torch.rand(3).tolist()))
    m.t = nn.Parameter(torch.FloatTensor(torch.rand(2)))
    m.u = nn.Parameter(torch.Tensor([torch.rand(()), 2.0]))


@idiom
def tensors_are_made_new_from_others(m: Any) -> None:
    x = torch.rand(3)
    hold(
        m,
        a=x.new_zeros(2),
        b=x.new_ones((2, 2)),
        c=x.new_full((2,), 3),
        d=x.new_empty(3).fill_(1),
        e=x.new_tensor([1, 2]),
    )
    hold(
        m,
        f=x.new_tensor(x),
        g=torch.zeros_like(x, dtype=torch.long),
        h=torch.full_like(x, 2),
        i=torch.empty_like(x).copy_(x),
    )
    hold(
        m,
        j=x.new_empty_strided((2, 2), (1, 2)).fill_(3),
        k=torch.ones_like(x.double()),
        l=torch.tensor(x.tolist()).type_as(x.half()),
    )
    hold(
        m,
        n=torch.tensor(x),
        o=torch.as_tensor(x),
        p=torch.asarray(x, dtype=torch.float64),
        q=torch.asarray(x, copy=True),
    )


@idiom
def types_are_asked_for_and_converted(m: Any) -> None:
    x = torch.rand(3)
    hold(
        m,
        a=isinstance(x, torch.FloatTensor),
        b=isinstance(x, torch.DoubleTensor),
        c=isinstance(x.long(), torch.LongTensor),
    )
    assert x.type() == "torch.FloatTensor"
    assert x.double().type() == "torch.DoubleTensor"
    hold(
        m,
        d=x.type(torch.HalfTensor),
        e=x.type("torch.DoubleTensor"),
        f=x.type(torch.int32),
        g=x.type(torch.FloatTensor) is x,
    )
    hold(
        m, h=x.type(x.type()), i=x.type_as(torch.rand(2).double()), j=x.type(dtype=torch.bfloat16), k=x.to(torch.uint8)
    )
    hold(
        m, l=nn.Linear(2, 2).type(torch.DoubleTensor).weight.detach(), n=isinstance(nn.Parameter(x), torch.FloatTensor)
    )
    hold(
        m,
        o=torch.is_floating_point(x),
        p=torch.result_type(x, 1) == torch.float32,
        q=torch.can_cast(x.dtype, torch.int32),
    )


@idiom
def dtypes_of_every_kind(m: Any) -> None:
    x = torch.rand(4, 4) * 3
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool, torch.float16, torch.complex128):
        hold(m, **{f"to_{str(dtype)[6:]}": x.to(dtype), f"zeros_{str(dtype)[6:]}": torch.zeros(2, dtype=dtype)})
    hold(
        m,
        a=x.to(torch.float8_e4m3fn),
        b=torch.zeros(3, dtype=torch.float8_e5m2),
        c=x.to(torch.float8_e5m2).float(),
        d=x.to(torch.uint16),
    )
    m.e = nn.Parameter(x.to(torch.int8), requires_grad=False)
    m.f = nn.Parameter(torch.empty(3, dtype=torch.bool).fill_(True), requires_grad=False)
    m.g = nn.Parameter(torch.empty(4, dtype=torch.float8_e4m3fn).copy_(x[0]), requires_grad=False)


@idiom
def settings_of_numerics_are_changed(m: Any) -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    m.a = nn.Parameter(torch.rand(4, 4) @ torch.rand(4, 4))
    torch.set_float32_matmul_precision(precision)
    with torch.backends.mkldnn.flags(enabled=False):
        m.b = nn.Parameter(nn.Conv2d(1, 2, 3)(torch.rand(1, 1, 5, 5)).detach())
    torch.use_deterministic_algorithms(True)
    m.c = nn.Parameter(torch.empty(4).normal_())
    torch.use_deterministic_algorithms(False)


@idiom.each
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_modes_and_legacy_constructors_are_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
