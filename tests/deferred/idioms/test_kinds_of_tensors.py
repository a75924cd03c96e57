"""Constructors with tensors that are not plain: sparse, nested, quantized, scripted, compiled, of another class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def sparse_tensors_are_made_and_read(m: Any) -> None:
    m.register_buffer("dense", (torch.eye(4) * torch.rand(4)).to_sparse().to_dense())
    sparse = torch.eye(4).to_sparse()
    hold(
        m,
        values=sparse.values(),
        indices=sparse.indices(),
        product=torch.sparse.mm(sparse, torch.rand(4, 2)),
        sum=torch.sparse.sum(sparse).item(),
    )
    coo = torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 0]]), torch.rand(2), (3, 3))
    hold(
        m,
        coo=coo.to_dense(),
        coalesced=coo.coalesce().values(),
        added=(coo + coo).to_dense(),
        scaled=(coo * 2).coalesce().values(),
        t=coo.t().to_dense(),
    )
    csr = (torch.rand(3, 3) > 0.5).float().to_sparse_csr()
    hold(m, csr=csr.to_dense(), rows=csr.crow_indices(), product2=csr @ torch.rand(3, 2), columns=csr.col_indices())
    m.new = nn.Parameter(torch.tensor([1.0, 2.0]))


@idiom
def sparse_tensors_are_held(m: Any) -> None:
    m.sparse = torch.eye(4).to_sparse()
    m.csr = torch.eye(3).to_sparse_csr()
    m.after = nn.Parameter(torch.rand(3))
    hold(m, dense=m.sparse.to_dense() + 1)


@idiom
def nested_tensors_are_made(m: Any) -> None:
    nested = torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)])
    hold(
        m, padded=torch.nested.to_padded_tensor(nested, 0.0), first=nested.unbind()[0], doubled=(nested * 2).unbind()[1]
    )
    jagged = torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)], layout=torch.jagged)
    hold(
        m,
        values=jagged.values(),
        offsets=jagged.offsets(),
        other=torch.nested.as_nested_tensor([torch.rand(2), torch.rand(3)]).unbind()[1],
    )


@idiom
def tensors_are_quantized(m: Any) -> None:
    x = torch.rand(4)
    q = torch.quantize_per_tensor(x, 0.1, 10, torch.quint8)
    hold(m, integers=q.int_repr(), back=q.dequantize(), scale=q.q_scale(), zero=q.q_zero_point())
    c = torch.quantize_per_channel(torch.rand(2, 3), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.qint8)
    hold(
        m,
        channels=c.dequantize(),
        scales=c.q_per_channel_scales(),
        fake=torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255),
    )


@idiom
def parts_are_scripted_and_traced(m: Any) -> None:
    m.a = torch.jit.script(nn.Linear(3, 3))
    m.b = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.rand(2, 3))
    hold(
        m,
        c=m.a(torch.rand(2, 3)).detach(),
        d=m.b(torch.rand(2, 3)).detach(),
        e=torch.jit.script(_scripted)(torch.rand(3)),
    )
    m.after = nn.Parameter(torch.randn(3))


def _scripted(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x * 2
    return x.mean() + torch.zeros([3])


@idiom
def parts_are_compiled_and_not_called(m: Any) -> None:
    m.a = torch.compile(nn.Linear(3, 3))
    m.b = nn.Linear(2, 2)
    m.b.compile()
    m.after = nn.Parameter(torch.randn(3))


@idiom
def parts_are_compiled_and_called(m: Any) -> None:
    m.a = torch.compile(nn.Linear(3, 3), backend="eager")
    hold(m, b=m.a(torch.ones(2, 3)).detach())
    hold(m, c=torch.compile(lambda x: (x * 2).sum(0), backend="eager")(torch.rand(3, 2)))
    m.after = nn.Parameter(torch.randn(3))


@idiom
def parts_are_exported_and_symbolically_traced(m: Any) -> None:
    m.a = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    m.b = nn.Linear(3, 3)
    hold(m, c=m.a(torch.rand(2, 3)).detach())


@idiom
def results_are_named_tuples(m: Any) -> None:
    x = torch.rand(3, 4)
    largest = x.max(1)
    hold(
        m,
        a=largest.values,
        b=largest.indices,
        c=largest[0],
        d=x.sort().values,
        e=torch.linalg.svd(x).Vh,
        f=x.mode(1).indices,
        g=torch.linalg.lu_factor_ex(x[:, :3]).pivots,
    )
    values, indices = x.min(0)
    hold(m, h=values, i=indices, j=torch.linalg.qr(x).R, k=x.median(0).values, l=x.cummin(0).values)


class _Wrapped:
    def __init__(self, value: Tensor) -> None:
        self.value = value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [a.value if isinstance(a, _Wrapped) else a for a in args]
        return cls(func(*plain, **(kwargs or {})))


@idiom
def objects_that_act_like_tensors_are_used(m: Any) -> None:
    x = _Wrapped(torch.rand(3))
    hold(m, a=torch.add(x, 1).value, b=torch.mul(x, torch.rand(3)).value)


@idiom.each
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
def test_other_kinds_of_tensors_are_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
