"""Constructors that look at values from Python."""

from __future__ import annotations

import ctypes
import io
import json
import math
import random
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def values_are_read_as_numbers(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(5))
    m.b = nn.Parameter(torch.tensor(m.a.tolist()))
    m.c = nn.Parameter(torch.tensor([m.a[0].item(), float(m.a.data[1]), m.a.data[2]]))
    m.n = nn.Parameter(torch.zeros(int(m.a.abs().sum()) + 1))
    hold(m, d=complex(m.a.data[0]).real, e=m.a.data[1].__float__(), f=[2][int(torch.zeros((), dtype=torch.long))])


@idiom
def values_are_read_by_the_math_module(m: Any) -> None:
    x = torch.rand(())
    hold(m, a=math.sqrt(x), b=math.floor(x * 10), c=math.ceil(x * 10), d=math.log(x), e=math.isfinite(x))
    hold(m, f=round(float(x), 2), g=pow(2.0, float(x)), h=math.fsum(torch.rand(4)), i=math.prod(torch.rand(4).tolist()))


@idiom
def values_are_python_operators(m: Any) -> None:
    x = torch.tensor(7)
    y = torch.randint(1, 5, ())
    hold(m, a=x // y, b=divmod(x.item(), y.item())[1], c=-x, d=abs(-x), e=x**y, f=x << 1, g=~x, h=2 - x, i=2 / x)
    hold(m, j=3**y, k=x & 3, l=1 | x, n=x % y, o=10 // y, p=2 ** torch.arange(4.0), q=range(10)[y], r=hash(3))


@idiom
def values_are_printed(m: Any) -> None:
    m.a = nn.Parameter(torch.rand(4))
    text = io.StringIO()
    print(m.a, m.a.data, m.a[0], file=text)
    print(f"{m.a.data[0]:.3f} {m.a.data[0]} {m.a.data} {m.a!r}", file=text)
    print(format(m.a.data[1], ".4f"), f"{m.a.data[2]:.5f}", str(m.a.data), file=text)
    hold(m, text=list(text.getvalue().encode()))


@idiom
def integers_are_printed_in_hexadecimal(m: Any) -> None:
    n = torch.randint(1, 1000, ())
    hold(m, text=list(f"{n} {n:d} {n:04x} {hex(n)} {bin(n)} {oct(n)}".encode()))


@idiom
def a_tensor_is_iterated(m: Any) -> None:
    x = torch.randn(3, 2)
    m.a = nn.ParameterList(nn.Parameter(row * 2) for row in x)
    first, second, third = x
    with torch.no_grad():
        second.zero_()
    hold(m, x=x, first=first, third=third, flat=[float(v) for row in x for v in row], n=len(x))
    for i, row in enumerate(x):
        row += i
    hold(m, listed=torch.stack(list(x)), reversed=torch.stack(list(reversed(list(x)))), zipped=[a + b for a, b in x])


@idiom
def membership_is_asked(m: Any) -> None:
    x = torch.randint(0, 4, (6,))
    hold(m, a=2 in x, b=torch.tensor(3) in x, c=5 in x, d=x.tolist().index(x[3].item()), e=x.tolist().count(1))


@idiom
def tensors_are_compared_whole(m: Any) -> None:
    x = torch.rand(4)
    y = x.clone()
    hold(m, a=torch.equal(x, y), b=torch.allclose(x, y + 1e-9), c=x.equal(y * 2), d=bool((x == y).all()))
    hold(m, e=torch.is_nonzero(x[:1]), f=x.is_same_size(y), g=torch.equal(x, torch.tensor(x.tolist())), h=bool(x.any()))
    hold(m, i=(x == y), j=x.isclose(y), k=torch.is_same_size(x, y), l=x.allclose(torch.ones(4)))


@idiom
def indices_are_deferred_tensors(m: Any) -> None:
    x = torch.randn(6, 4)
    order = torch.randperm(6)
    one = torch.randint(0, 6, ())
    mask = torch.rand(6) > 0.5
    hold(
        m,
        a=x[order],
        b=x[one],
        c=x[mask],
        d=x[order[:3], one % 4],
        e=x[:, mask[:4]],
        f=x[one : one + 2],
        g=x[..., one % 4],
    )
    hold(m, h=[10, 20, 30, 40, 50, 60][one], i=x[order.tolist()], j=x[[0, 2]], k=x[None, one], l=x[x > 0])


@idiom
def writes_are_indexed_by_deferred_tensors(m: Any) -> None:
    x = torch.zeros(6, 4)
    order = torch.randperm(6)
    x[order] = torch.randn(6, 4)
    x[order[0]] = 3
    x[torch.rand(6) > 0.5] *= 2
    x[:, torch.randint(0, 4, ())] = torch.rand(6)
    x[x > 1] = x[x > 1] - 1
    x[torch.tensor(2), :] += 5
    m.x = nn.Parameter(x)


@idiom
def a_seed_is_drawn(m: Any) -> None:
    seed = int(torch.empty((), dtype=torch.int64).random_().item())
    generator = torch.Generator().manual_seed(seed)
    random.seed(seed)
    m.a = nn.Parameter(torch.randn(3, generator=generator) * random.random())
    torch.manual_seed(int(torch.randint(0, 2**31, ())))
    m.b = nn.Parameter(torch.randn(3))


@idiom
def values_go_through_text_and_bytes(m: Any) -> None:
    x = torch.rand(4)
    text = json.dumps({"x": x.tolist()})
    packed = struct.pack("4f", *x)
    hold(
        m,
        a=json.loads(text)["x"],
        b=list(struct.unpack("4f", packed)),
        c=torch.frombuffer(bytearray(packed), dtype=torch.float32),
    )
    eight = torch.randint(0, 256, (5,), dtype=torch.uint8)
    hold(m, d=list(bytes(eight.tolist())), e=list(bytearray(eight)), f=list(bytes(eight)))


@idiom
def a_storage_is_read(m: Any) -> None:
    x = torch.rand(4)
    y = torch.rand(4)[1:]
    hold(
        m,
        a=x.untyped_storage().tolist(),
        b=list(y.untyped_storage()),
        c=x.untyped_storage().nbytes(),
        d=x.element_size(),
    )
    hold(m, e=len(x.untyped_storage()), f=list(bytes(x.untyped_storage())), g=x.untyped_storage()[3])


@idiom
def a_typed_storage_is_read(m: Any) -> None:
    x = torch.rand(4)
    hold(m, a=x.storage().tolist(), b=x.storage()[2], c=list(x.storage()), d=x.storage().size(), e=len(x.storage()))


@idiom
def a_storage_is_written(m: Any) -> None:
    x = torch.rand(4)
    x.untyped_storage().fill_(0)
    y = torch.rand(4)
    y.untyped_storage().copy_(torch.ones(4).untyped_storage())
    z = torch.rand(4)
    z.untyped_storage()[0] = 7
    c = torch.rand(4)
    clone = c.untyped_storage().clone()
    c.zero_()
    hold(m, x=x, y=y, z=z, c=c, clone=torch.empty(0).set_(clone))


@idiom
def memory_is_read_by_address(m: Any) -> None:
    x = torch.rand(4)
    hold(m, a=list((ctypes.c_float * 4).from_address(x.data_ptr())))
    x.mul_(2)
    hold(m, b=list((ctypes.c_float * 4).from_address(x.data_ptr())))
    y = x[1:]
    hold(m, c=(y.data_ptr() - x.data_ptr()), d=x.untyped_storage().data_ptr() == x.data_ptr())


@idiom.on_host("the host writes a device's memory by address")
def memory_is_written_by_address(m: Any) -> None:
    x = torch.zeros(4)
    memory = (ctypes.c_float * 4).from_address(x.data_ptr())
    memory[2] = 5.0
    hold(m, x=x, y=x * 2)
    memory[1] = 3.0
    x.add_(1)
    hold(m, z=x.clone())


@idiom
def ties_are_found_by_address(m: Any) -> None:
    a, b = torch.rand(4), torch.rand(4)
    c = a.view(2, 2)
    hold(m, same=a.data_ptr() == c.data_ptr(), other=a.data_ptr() == b.data_ptr(), sum=a.data_ptr() != 0)
    pointers = {t.untyped_storage().data_ptr() for t in (a, b, c, a[2:])}
    hold(m, count=len(pointers), empty=torch.empty(0).data_ptr())


@idiom
def questions_about_a_tensor_are_answered(m: Any) -> None:
    x = torch.rand(3, 4).t()
    hold(m, a=x.is_contiguous(), b=x.stride(), c=x.storage_offset(), d=x.numel(), e=x.dim(), f=x.is_floating_point())
    hold(m, g=x.is_pinned(), h=x.is_shared(), i=x.requires_grad, j=x.is_sparse, k=x.nbytes, l=x.layout == torch.strided)
    hold(m, n=x.is_signed(), o=x.is_inference(), p=torch.is_tensor(x), q=x.get_device(), r=x._version, s=x.itemsize)
    hold(m, t=x.is_conj(), u=x.is_neg(), v=x.is_complex(), w=x.is_quantized, y=x.is_leaf, z=x.is_set_to(x))
    hold(
        m,
        ab=x.is_mkldnn,
        ac=x.is_xla,
        ad=x.is_mps,
        ae=x.is_cuda,
        af=x.is_cpu,
        ag=x.is_meta,
        ah=x.dense_dim(),
        ai=x.is_nested,
    )


@idiom
def a_min_and_a_max_are_read(m: Any) -> None:
    x = torch.rand(10)
    low, high = torch.aminmax(x)
    values, indices = x.max(dim=0)
    hold(
        m, a=low.item(), b=high.item(), c=values.item(), d=indices.item(), e=x.argmax(), f=x.std().item(), g=x.median()
    )
    hold(m, h=torch.histc(x, 4), i=x.quantile(0.5), j=torch.bincount(torch.randint(0, 4, (9,))), k=x.mode().values)


@idiom
def a_table_is_built_number_by_number(m: Any) -> None:
    table = torch.zeros(4, 3)
    for i in range(4):
        for j in range(3):
            table[i, j] = math.sin(i / (j + 1)) + (table[i - 1, j].item() if i else 0)
    m.table = nn.Parameter(table)


@idiom
def a_python_function_is_applied_to_each_number(m: Any) -> None:
    x = torch.rand(4)
    x.apply_(lambda v: v * 2 + 1)
    y = torch.rand(4)
    y.map_(x, lambda a, b: a + b)
    hold(m, x=x, y=y)


@idiom
def tensors_are_keys_and_are_told_apart_by_identity(m: Any) -> None:
    x, y = torch.rand(2), torch.rand(2)
    names = {x: 1, y: 2}
    hold(m, a=names[x], b=names[y], c=x is not y, d=id(x) == id(x), e=len({x, y, x}))


@idiom
def a_list_of_tensors_becomes_a_tensor(m: Any) -> None:
    x = [torch.rand(()) for _ in range(3)]
    hold(m, a=torch.tensor(x), b=torch.tensor([x, x]), c=torch.as_tensor(x), d=torch.Tensor(x), e=torch.FloatTensor(x))
    hold(m, f=torch.tensor([v * 2 for v in x], dtype=torch.float64), g=torch.asarray(x), h=torch.rand(2).new_tensor(x))
    hold(
        m,
        i=torch.tensor([torch.rand(3).tolist(), [1, 2, 3]]),
        j=torch.full((2,), x[0]),
        k=torch.rand(2).new_full((2,), x[1]),
    )
    hold(m, l=torch.arange(0, x[0] * 10), n=torch.linspace(x[0], x[1], 4), o=torch.scalar_tensor(x[2].item()))


@idiom
def numbers_are_passed_as_tensors(m: Any) -> None:
    n = torch.randint(2, 5, ())
    m.layer = nn.Linear(n, int(n) + 1)
    hold(m, a=torch.zeros(n), b=torch.ones(n, n), c=torch.rand(4).add(1, alpha=torch.rand(()).item()), d=torch.eye(n))
    hold(
        m,
        e=torch.rand(n).repeat(n),
        f=torch.rand(n).expand(n, n),
        g=torch.rand(12).view(n - n + 3, -1),
        h=torch.randn(n),
    )


@idiom
def a_parameter_is_scaled_by_what_was_read_from_it(m: Any) -> None:
    m.weight = nn.Parameter(torch.randn(10, 10))
    with torch.no_grad():
        m.weight /= m.weight.abs().max().item()
        m.weight.mul_(float(torch.linalg.norm(m.weight)))
        for _ in range(5):
            m.weight.mul_(1 / m.weight.std().item())


@idiom
def an_answer_is_read_before_and_after_a_write(m: Any) -> None:
    x = torch.rand(5)
    a = x[0].item()
    x[0] = 7
    b = x[0].item()
    view = x[1:]
    c = view.tolist()
    x.fill_(2)
    d = view.tolist()
    hold(m, a=a, b=b, c=c, d=d)


@idiom
def a_scalar_of_each_dtype_is_read(m: Any) -> None:
    for dtype in (torch.uint8, torch.int16, torch.int64, torch.bool, torch.bfloat16, torch.float16, torch.float64):
        x = torch.ones(3, dtype=dtype)
        x[1] = 0
        hold(m, **{f"read_{str(dtype)[6:]}": [float(v) for v in x.tolist()]})
    z = torch.tensor([1 + 2j]).mul(2).item()
    hold(m, real=z.real, imag=z.imag)


@idiom
def tensors_are_compared_with_python_numbers(m: Any) -> None:
    x = torch.rand(())
    hold(m, a=bool(x < 0.5), b=bool(x > 0.5), c=x == 1, d=(x != 1).item(), e=1 if x else 0, f=x.item() > 0 and True)


@idiom
def parts_of_a_large_value_are_read(m: Any) -> None:
    x: Tensor = torch.randn(100, 100)
    hold(m, a=[x[i, i].item() for i in range(0, 100, 10)], b=x.diagonal().sum().item(), c=x[3:5, 7].tolist())


@idiom.each
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_host_reads_are_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
