"""Constructors that write through views and exchange what tensors point to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def data_is_assigned(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    m.a.data = torch.ones(2, 2)
    m.b = nn.Parameter(torch.randn(3))
    m.b.data = torch.tensor([7.0, 8.0])
    m.c = nn.Parameter(torch.zeros(2))
    m.c.data = m.a.data * 2
    m.d = nn.Parameter(torch.tensor([1.0]))
    m.d.data = torch.randn(4)
    m.e = nn.Parameter(torch.randn(4))
    m.e.data = m.e.data.t().contiguous()[:2]
    m.f = nn.Parameter(torch.tensor([1.0]))
    m.f.data = torch.tensor([2.0, 3.0])
    m.f.data.mul_(2)


@idiom
def data_of_another_dtype_is_assigned(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    m.a.data = m.a.data.double()
    m.b = nn.Parameter(torch.randn(3), requires_grad=False)
    m.b.data = torch.ones(2, dtype=torch.int64)
    m.c = nn.Parameter(torch.randn(3))
    m.c.data = m.c.to(torch.bfloat16)
    m.c.data = m.c.data.to(torch.complex64)


@idiom
def two_parameters_share_data(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    m.b = nn.Parameter(torch.randn(3))
    m.b.data = m.a.data
    with torch.no_grad():
        m.b.mul_(2)
    m.c = nn.Parameter(m.a)
    m.d = nn.Parameter(m.a.data[1:])
    m.c.data[0] = 9


@idiom
def tensors_are_set(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(6))
    with torch.no_grad():
        m.b = nn.Parameter(torch.empty(0).set_(m.a.data))
        m.c = nn.Parameter(torch.randn(2).set_(m.a.untyped_storage(), 1, (2, 2), (2, 1)))
        m.d = nn.Parameter(torch.randn(5))
        m.d.set_(torch.randn(2, 2))
        m.e = nn.Parameter(torch.randn(3))
        m.e.set_()
        m.f = nn.Parameter(torch.randn(3))
        m.f.set_(torch.tensor([1.0, 2.0]))
        m.g = torch.tensor([5.0])
        m.g.set_(torch.rand(2))
        hold(m, h=m.g * 2)
    m.c.data.add_(1)


@idiom
def tensors_are_resized(m: Any) -> None:
    x = torch.randn(6)
    x.resize_(2, 2)
    y = torch.randn(2)
    y.resize_(4)
    y[2:] = 5
    z = torch.empty(0)
    z.resize_(3).normal_()
    w = torch.randn(4)
    w.untyped_storage().resize_(0)
    w.untyped_storage().resize_(16)
    w.fill_(1)
    v = torch.randn(4).resize_as_(torch.ones(2, 2))
    hold(m, x=x, y=y, z=z, w=w, v=v)


@idiom
def views_of_every_kind_are_written(m: Any) -> None:
    m.a = nn.Parameter(torch.empty(6, 4))
    with torch.no_grad():
        m.a[:2].normal_()
        m.a[2:].zero_()
        m.a[:, 1].fill_(5)
        m.a.t()[3].uniform_()
        m.a[m.a > 1] = 0.5
        m.a[torch.tensor([0, 3])] += 1
        m.a.diagonal().add_(1)
        m.a.view(-1)[::5] = 2
        m.a.flatten()[3] = -1
        m.a.as_strided((2, 2), (8, 1), 1).mul_(3)
        m.a.unsqueeze(0).squeeze(0).select(1, 2).neg_()
        m.a.narrow(0, 4, 2).exp_()
        m.a.reshape(3, 8)[1].sub_(1)
        m.a.movedim(0, 1)[0].add_(0.25)
        m.a.unfold(0, 2, 2)[1].mul_(0.5)
        m.a.unflatten(1, (2, 2))[:, 1, 0].div_(3)
        m.a.swapaxes(0, 1).T.mT[1].clamp_(-1, 1)


@idiom
def pieces_are_written(m: Any) -> None:
    m.a = nn.Parameter(torch.empty(8, 3))
    with torch.no_grad():
        first, second, third, fourth = m.a.chunk(4)
        nn.init.xavier_uniform_(first)
        nn.init.orthogonal_(second)
        third.copy_(first)
        fourth.normal_(0, 0.1)
        for row in m.a.unbind(0):
            row[0] = 1
        m.a.split([3, 5])[1].mul_(2)
        m.a.tensor_split(3)[0].add_(1)
        torch.hsplit(m.a, 3)[1].zero_()
        torch.split(m.a, 2)[3].fill_(4)
        m.a.split_with_sizes([1, 7])[0].uniform_()


@idiom
def expanded_and_overlapping_views_are_parameters(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(1, 3).expand(4, 3))
    m.b = nn.Parameter(torch.randn(3, 1).expand(-1, 5).clone())
    m.c = nn.Parameter(torch.randn(8).as_strided((3, 4), (2, 1)))
    hold(
        m, d=torch.randn(()).expand(3, 3), e=torch.arange(10.0).unfold(0, 4, 2), f=torch.ones(1).expand(1000, 1000, 10)
    )
    hold(
        m,
        g=torch.broadcast_to(torch.rand(2), (3, 2)),
        h=torch.rand(3).repeat_interleave(2),
        i=torch.zeros(1).expand(2, 0),
    )
    with torch.no_grad():
        m.a[0, 1:2].squeeze().fill_(3)


@idiom
def views_of_another_dtype_are_written(m: Any) -> None:
    x = torch.randn(4)
    x.view(torch.int32)[0] = 0x3F800000
    y = torch.zeros(4, dtype=torch.uint8)
    y.view(torch.float32).fill_(1.5)
    z = torch.randn(4).view(torch.uint8)
    w = torch.randn(2, 4).to(torch.bfloat16).view(torch.int16)
    w ^= 1
    hold(m, x=x, y=y, z=z, w=w, v=torch.randn(4, 2).view(torch.complex64))


@idiom
def ties_and_views_are_kept(m: Any) -> None:
    m.a = nn.Linear(4, 4, bias=False)
    m.b = nn.Linear(4, 4, bias=False)
    m.b.weight = m.a.weight
    m.register_buffer("whole", torch.randn(8))
    m.register_buffer("part", m.whole[:4])
    m.c = nn.Linear(4, 4, bias=False)
    m.c.weight.data = m.a.weight.data.t()


@idiom
def a_flat_parameter_is_cut_into_pieces(m: Any) -> None:
    m.flat = nn.Parameter(torch.empty(20))
    m.net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    offset = 0
    with torch.no_grad():
        for parameter in m.net.parameters():
            piece = m.flat[offset : offset + parameter.numel()].view_as(parameter)
            piece.copy_(parameter)
            parameter.data = piece
            offset += parameter.numel()
        m.flat.mul_(2)


@idiom
def parameters_become_a_vector_and_back(m: Any) -> None:
    m.net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
    vector = nn.utils.parameters_to_vector(m.net.parameters())
    nn.utils.vector_to_parameters(vector * 2 + 1, m.net.parameters())
    hold(m, vector=vector.detach())


@idiom
def a_last_pass_initializes_again(m: Any) -> None:
    m.layers = nn.ModuleList(nn.Linear(20, 20) for _ in range(4))
    for module in m.layers:
        module.weight.data.normal_(0, 0.02)
        nn.init.zeros_(module.bias)


@idiom
def parts_of_weights_are_initialized(m: Any) -> None:
    m.qkv = nn.Linear(6, 18)
    nn.init.xavier_uniform_(m.qkv.weight[:12])
    nn.init.trunc_normal_(m.qkv.weight[12:, :3], std=0.1, a=-0.1, b=0.1)
    nn.init.orthogonal_(m.qkv.weight[6:12])
    nn.init.eye_(m.qkv.weight[:6])
    nn.init.constant_(m.qkv.bias[::2], 3)
    nn.init.sparse_(m.qkv.weight[:, 3:], 0.5)
    m.lstm = nn.LSTM(3, 4)
    m.lstm.bias_ih_l0.data[4:8].fill_(1)
    m.lstm.bias_hh_l0.data.chunk(4)[1].fill_(1)


@idiom
def a_row_is_padded_with_zeros(m: Any) -> None:
    m.embedding = nn.Embedding(10, 4, padding_idx=3)
    nn.init.normal_(m.embedding.weight)
    m.embedding.weight.data[m.embedding.padding_idx].zero_()
    m.more = nn.Embedding.from_pretrained(torch.randn(4, 3), freeze=True)
    m.resized = nn.Embedding(12, 4)
    m.resized.weight.data[:10] = m.embedding.weight.data


@idiom
def in_place_operations_of_every_kind(m: Any) -> None:
    x = torch.rand(4, 4)
    x.add_(1).mul_(2).clamp_(0, 3).tril_().t_().neg_().abs_()
    x += torch.eye(4)
    x @= torch.rand(4, 4)
    x.addmm_(torch.rand(4, 4), torch.rand(4, 4)).addcmul_(x, x, value=0.1)
    x.masked_fill_(x > 3, -1).index_fill_(0, torch.tensor([1]), 2).fill_diagonal_(9)
    x.scatter_(1, torch.tensor([[0], [1], [2], [3]]), 7.0).lerp_(torch.ones(4, 4), 0.5)
    x.index_copy_(0, torch.tensor([0]), torch.rand(1, 4)).index_add_(1, torch.tensor([2]), torch.rand(4, 1))
    x.put_(torch.tensor([3]), torch.tensor([8.0])).masked_scatter_(x > 8, torch.rand(16)).cumsum_(0)
    x.unsqueeze_(0).squeeze_().transpose_(0, 1).sigmoid_().logit_().nan_to_num_().round_(decimals=2)
    x.copy_(x.flip(0)).zero_().uniform_()
    x.index_put_((torch.tensor([0, 0]),), torch.tensor(1.0), accumulate=True)
    x.scatter_add_(0, torch.zeros(1, 4, dtype=torch.long), torch.rand(1, 4)).scatter_reduce_(
        0, torch.ones(1, 4, dtype=torch.long), torch.rand(1, 4), "amax"
    )
    m.x = nn.Parameter(x)


@idiom
def results_are_written_into_out(m: Any) -> None:
    x, y = torch.rand(3, 3), torch.empty(3, 3)
    torch.add(x, 1, out=y)
    z = torch.empty(0)
    torch.matmul(x, y, out=z)
    w = torch.empty(3)
    torch.randn(3, out=w)
    v = torch.zeros(3, 3)
    torch.exp(x[0], out=v[1])
    q, r = torch.empty(0), torch.empty(0)
    torch.linalg.qr(x, out=(q, r))
    u = torch.empty(3, 6)
    torch.cat([x, y], dim=1, out=u)
    values, indices = torch.empty(3), torch.empty(3, dtype=torch.long)
    torch.max(x, 0, out=(values, indices))
    hold(m, y=y, z=z, w=w, v=v, q=q, r=r, u=u, values=values, indices=indices)
    hold(m, a=torch.arange(3, out=torch.empty(0, dtype=torch.long)), b=torch.normal(x, 1.0, out=torch.empty(3, 3)))


@idiom
def a_write_in_one_place_is_seen_in_all(m: Any) -> None:
    x = torch.zeros(2, 3)
    views = [x, x.t(), x.view(-1), x[1], x.detach(), x.data, nn.Parameter(x), x.unsqueeze(0)]
    for i, view in enumerate(views):
        with torch.no_grad():
            view.add_(i)
    hold(m, **{f"v{i}": view.detach() for i, view in enumerate(views)})


@idiom
def strides_are_kept(m: Any) -> None:
    m.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    m.a = nn.Parameter(torch.randn(3, 4).t())
    m.b = nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    m.c = nn.Parameter(torch.empty_strided((3, 4), (1, 3)).normal_())
    m.d = nn.Parameter(torch.empty_like(m.a).uniform_())
    m.e = nn.Parameter(torch.randn(4, 4)[::2, ::2])
    m.f = nn.Parameter(torch.empty((2, 3, 4, 5), memory_format=torch.channels_last).normal_())
    m.g = nn.Parameter(torch.randn(4, 6)[:, 2:5].clone())
    m.h = nn.Parameter(torch.empty_strided((2, 2), (10, 3)).fill_(1))
    m.i = nn.Parameter(m.b.detach() + 1)
    m.j = nn.Parameter(torch.randn(3, 5).t().contiguous() * torch.randn(3, 5).t())
    m.k = nn.Parameter(torch.empty_permuted((2, 3, 4), (2, 0, 1)).normal_())
    m.l = nn.Parameter(m.a.detach().double())
    m.n = nn.Parameter(m.b.detach().permute(1, 0, 2, 3).reshape(3, -1))


@idiom
def zero_sizes_and_scalars(m: Any) -> None:
    m.a = nn.Parameter(torch.empty(0))
    m.b = nn.Parameter(torch.tensor(1.5))
    m.c = nn.Parameter(torch.ones(()))
    m.d = nn.Parameter(torch.randn(0, 3))
    m.e = nn.Parameter(torch.randn(()))
    m.f = nn.Parameter(torch.cat([torch.empty(0), torch.rand(2)]))
    m.g = nn.Parameter(torch.rand(3)[3:])
    m.h = nn.Parameter(torch.zeros(2, 0).sum(1))
    m.i = nn.Parameter(torch.empty(0, 4).normal_())
    m.j = nn.Parameter(torch.stack([torch.rand(()) for _ in range(3)]))
    m.k = nn.Parameter(torch.empty(3, 0).new_zeros(2))
    hold(m, l=torch.rand(0).mean().isnan(), n=m.a.data.numel(), o=m.d.data.tolist() == [])


@idiom
def memory_is_shared_pinned_or_moved(m: Any) -> None:
    m.a = nn.Linear(3, 3).share_memory()
    m.b = nn.Parameter(torch.rand(3))
    m.b.share_memory_()
    m.c = nn.Linear(2, 2).cpu()
    m.d = nn.Linear(2, 2).to("cpu", torch.float64)
    x = torch.rand(2)
    assert x.cpu() is x
    assert x.to("cpu") is x
    assert x.contiguous() is x
    assert x.to(torch.float32) is x
    assert x.float() is x
    assert x.to(x) is x
    assert x.cpu().data_ptr() == x.data_ptr()
    hold(m, x=x.to("cpu", copy=True), y=x.clone(), z=x.to(torch.device("cpu", 0)))


@idiom
def large_strides_hold_little(m: Any) -> None:
    hold(m, a=torch.ones(1).expand(10_000, 10_000)[:2, :2].clone(), b=torch.randn(7).as_strided((2, 2), (5, 1)))
    m.c = nn.Parameter(torch.zeros(()).expand(1000, 1000))


@idiom.each
def test_storages_and_views_are_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
