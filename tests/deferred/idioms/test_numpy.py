"""Constructors that exchange memory with NumPy and others."""

from __future__ import annotations

import array
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def constants_come_from_numpy(m: Any) -> None:
    m.a = nn.Parameter(torch.from_numpy(np.arange(6.0)))
    m.b = nn.Parameter(torch.tensor(np.array([1.0, 2.0])))
    m.c = nn.Parameter(torch.as_tensor(np.ones((2, 2), dtype=np.float32)))
    m.d = nn.Parameter(torch.Tensor(np.arange(3.0)))
    m.e = nn.Parameter(torch.asarray(np.float32(3.5)))
    m.f = nn.Parameter(torch.from_numpy(np.arange(12.0).reshape(3, 4).T))
    hold(m, g=torch.tensor([np.float64(1.5), np.int32(2)]), h=torch.from_numpy(np.array([True, False])))
    hold(m, i=torch.from_numpy(np.arange(10))[::3], j=torch.full((2,), np.pi), k=torch.rand(3) * np.float32(2))


@idiom
def an_array_shares_the_memory_of_a_parameter(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(5))
    array_ = m.a.detach().numpy()
    array_[0] = 42.0
    m.b = nn.Parameter(torch.from_numpy(np.sqrt(np.abs(array_))))
    m.a.data.mul_(2)
    hold(m, seen=array_.tolist())
    array_ += 1
    m.a.data.add_(1)
    hold(m, seen_again=array_.tolist())
    array_[1] = -1


@idiom
def an_array_shares_the_memory_of_a_view(m: Any) -> None:
    x = torch.randn(4, 3)
    row = x[1].numpy()
    column = x[:, 2].numpy()
    row[:] = 1
    column[:] = np.arange(4)
    x.mul_(2)
    hold(m, x=x, row=row.tolist(), column=column.tolist())


@idiom
def two_arrays_share_the_memory_of_one_parameter(m: Any) -> None:
    x = torch.randn(4)
    first, second = x.numpy(), x.numpy()
    first[0] = 5
    second[1] = first[0] + 1
    hold(m, x=x, seen=first.tolist())


@idiom
def an_array_is_filled_after_it_became_a_parameter(m: Any) -> None:
    array_ = np.zeros(4, dtype=np.float32)
    m.a = nn.Parameter(torch.from_numpy(array_))
    m.b = nn.Parameter(m.a.detach() + 1)
    array_[:] = np.arange(4)
    m.c = nn.Parameter(m.a.detach() + 1)
    m.a.data.mul_(2)
    hold(m, seen=array_.tolist())


@idiom
def an_array_that_was_copied_is_changed(m: Any) -> None:
    array_ = np.zeros(4, dtype=np.float32)
    x = torch.zeros(4)
    x.copy_(torch.from_numpy(array_))
    y = torch.zeros(4) + torch.from_numpy(array_)
    array_[:] = 7
    hold(m, x=x, y=y)


@idiom
def a_large_array_that_was_copied_is_changed(m: Any) -> None:
    array_ = np.zeros(400_000, dtype=np.float32)
    x = torch.zeros(400_000)
    x.copy_(torch.from_numpy(array_))
    array_[:] = 7
    m.x = nn.Parameter(x)


@idiom
def a_large_constant_is_edited_after_it_was_read(m: Any) -> None:
    large = torch.from_numpy(np.ones(400_000, dtype=np.float32))
    m.a = nn.Parameter(torch.zeros(400_000))
    m.a.data.copy_(large)
    large.mul_(3)
    m.b = nn.Parameter(torch.zeros(400_000))
    m.b.data.copy_(large)


@idiom
def numpy_functions_take_tensors(m: Any) -> None:
    x = torch.rand(3, 4)
    hold(m, a=torch.from_numpy(np.asarray(x)).clone(), b=np.array(x).tolist(), c=np.sqrt(x), d=np.mean(x.numpy()))
    hold(
        m,
        e=torch.from_numpy(np.linalg.qr(x.numpy())[0]),
        f=torch.as_tensor(np.stack([x, x])),
        g=float(np.float32(x[0, 0])),
    )
    hold(m, h=torch.from_numpy(np.asarray(x, dtype=np.float64)), i=np.arange(10)[torch.tensor([1, 2])].tolist())
    hold(m, j=np.array([1.0, 2.0]) @ np.asarray(x)[:2], k=np.allclose(x, x), l=np.prod(x.shape), n=np.add(1, x.numpy()))
    hold(
        m,
        o=x.numpy(force=True).tolist(),
        p=x.detach().cpu().numpy().astype("float16").tolist(),
        q=np.random.RandomState(0).permutation(3)[torch.tensor(1)],
    )


@idiom
def numpy_arrays_meet_tensors_in_operators(m: Any) -> None:
    x = torch.rand(3)
    y = np.arange(3, dtype=np.float32)
    hold(
        m,
        a=x + torch.from_numpy(y),
        b=x * y,
        c=np.float32(2) * x.numpy(),
        d=x.numpy() * y,
        e=x / np.float64(3),
        f=x[np.array([0, 2])],
    )
    x[np.array([True, False, True])] = 5
    x[np.int64(1)] = 6
    hold(m, x=x, g=x[y > 0], h=x[np.arange(2)])


@idiom
def parameters_are_made_by_numpy_functions(m: Any) -> None:
    x = nn.Parameter(torch.empty(4, 4))
    x.data = torch.from_numpy(np.linalg.svd(np.eye(4) * 2)[0]).float()
    m.x = x
    m.y = nn.Parameter(torch.empty(3, 2))
    m.y.data.copy_(torch.from_numpy(np.random.RandomState(1).randn(3, 2)))
    with torch.no_grad():
        m.y[0] = torch.from_numpy(np.ones(2))


@idiom
def dlpack_shares_memory_both_ways(m: Any) -> None:
    x = torch.rand(4)
    array_ = np.from_dlpack(x)
    other = torch.from_dlpack(x)
    other.mul_(2)
    hold(m, x=x, seen=array_.tolist(), other=other)
    y = torch.from_dlpack(np.arange(4.0))
    y += 1
    capsule = torch.utils.dlpack.to_dlpack(x)
    hold(m, y=y, z=torch.utils.dlpack.from_dlpack(capsule))


@idiom
def buffers_of_other_libraries_become_tensors(m: Any) -> None:
    raw = bytearray(b"\x00\x00\x80\x3f" * 4)
    x = torch.frombuffer(raw, dtype=torch.float32)
    y = x + 1
    raw[0:4] = b"\x00\x00\x00\x40"
    hold(
        m,
        x=x,
        y=y,
        z=torch.frombuffer(array.array("f", [1.0, 2.0]), dtype=torch.float32),
        w=torch.tensor(array.array("d", [1.0])),
    )
    x.mul_(3)
    hold(m, raw=list(raw))


@idiom
def numpy_writes_into_a_buffer_of_the_model(m: Any) -> None:
    m.register_buffer("table", torch.zeros(4, 6))
    position = np.array([[p / 10000 ** (2 * (j // 2) / 6) for j in range(6)] for p in range(4)])
    m.table[:, 0::2] = torch.FloatTensor(np.sin(position[:, 0::2]))
    m.table[:, 1::2] = torch.FloatTensor(np.cos(position[:, 1::2]))
    m.table.numpy()[0] = 9


@idiom
def numpy_randomness_follows_its_own_stream(m: Any) -> None:
    np.random.seed(0)
    generator = np.random.default_rng(3)
    m.a = nn.Parameter(torch.from_numpy(np.random.randn(4)))
    m.b = nn.Parameter(torch.randn(3) * generator.random())
    np.random.seed(int(torch.randint(0, 1000, ())))
    m.c = nn.Parameter(torch.from_numpy(np.random.randn(4)))


@idiom
def a_real_array_takes_deferred_values(m: Any) -> None:
    array_ = np.zeros(3, dtype=np.float32)
    torch.from_numpy(array_).copy_(torch.randn(3))
    other = np.zeros(3, dtype=np.float32)
    other[:] = torch.rand(3)
    other[0] = torch.rand(())
    np.copyto(other[1:], torch.rand(2).numpy())
    torch.add(torch.rand(3), 1, out=torch.from_numpy(array_))
    hold(m, a=array_.tolist(), b=other.tolist(), c=torch.from_numpy(array_))


@idiom
def real_tensors_take_deferred_values(m: Any) -> None:
    real = torch.tensor([0.0, 0.0, 0.0])
    real.copy_(torch.randn(3))
    m.a = nn.Parameter(real)
    real2 = torch.from_numpy(np.zeros(4, dtype=np.float32))
    real2.normal_()
    m.b = nn.Parameter(real2)
    m.c = nn.Parameter(torch.randn(4))
    m.d = nn.Parameter(torch.rand_like(real2))


@idiom.each
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_numpy_and_shared_memory_are_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
