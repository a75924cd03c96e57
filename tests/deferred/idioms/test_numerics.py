"""Constructors that compute: linear algebra, Fourier, complex numbers, sorting, networks run once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def parameters_are_computed(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(4, 4) / 3 + torch.eye(4))
    m.b = nn.Parameter(torch.linspace(0, 1, 7) ** 2)
    m.c = nn.Parameter(torch.stack([torch.arange(3.0), torch.rand(3)]))
    m.d = nn.Parameter(torch.outer(torch.rand(3), torch.rand(4)).flatten())
    m.e = nn.Parameter(torch.cat([torch.rand(2, 3), torch.zeros(1, 3)]).softmax(-1).log())
    m.f = nn.Parameter(torch.logspace(0, 2, 5) / torch.rand(5).sum())


@idiom
def matrices_are_factored(m: Any) -> None:
    x = torch.randn(5, 5)
    s = x @ x.t() + torch.eye(5)
    hold(
        m,
        a=torch.linalg.qr(x)[0],
        b=torch.linalg.svd(x).S,
        c=torch.linalg.inv(x),
        d=torch.geqrf(x)[0],
        e=torch.linalg.cholesky(s),
    )
    hold(
        m,
        f=torch.linalg.eigh(s)[1],
        g=torch.linalg.eig(x)[0],
        h=torch.linalg.eigvals(x),
        i=torch.linalg.pinv(x[:3]),
        j=torch.linalg.matrix_exp(x),
    )
    hold(
        m,
        k=torch.linalg.lstsq(x, torch.rand(5, 2), driver="gels").solution,
        l=torch.det(x),
        n=torch.linalg.slogdet(x)[1],
        o=torch.linalg.solve(x, torch.rand(5)),
    )
    q, r = torch.linalg.qr(torch.randn(6, 3), mode="complete")
    u, s2, vh = torch.linalg.svd(torch.randn(4, 6), full_matrices=False)
    hold(
        m,
        q=q,
        r=r,
        u=u,
        s=s2,
        vh=vh,
        rank=torch.linalg.matrix_rank(x),
        norm=torch.linalg.norm(x, 2),
        cond=torch.linalg.cond(x),
    )
    hold(
        m,
        lu=torch.linalg.lu(x)[2],
        power=torch.linalg.matrix_power(x, 3),
        triangular=torch.linalg.solve_triangular(s.tril(), x, upper=False),
    )
    hold(
        m,
        ormqr=torch.ormqr(*torch.geqrf(x), x),
        householder=torch.linalg.householder_product(*torch.geqrf(x)),
        trace=x.trace(),
        kron=torch.kron(x, x),
    )
    hold(
        m,
        cholesky_solve=torch.cholesky_solve(x, s),
        lobpcg=torch.lobpcg(s, k=1, niter=3, X=torch.ones(5, 1))[0],
        multi=torch.linalg.multi_dot([x, s, x]),
    )
    hold(
        m,
        ldl=torch.linalg.ldl_factor(s)[0],
        tensorinv=torch.linalg.tensorinv(torch.rand(4, 2, 2) + torch.eye(4).view(4, 2, 2), ind=1),
        vander=torch.linalg.vander(x[0]),
    )
    hold(
        m,
        svd_lowrank=torch.svd_lowrank(x, q=3, niter=1)[1],
        cov=x.cov(),
        corrcoef=x.corrcoef(),
        cross=torch.linalg.cross(x[:, :3], x[:, 2:]),
    )


@idiom
def fourier_transforms_are_taken(m: Any) -> None:
    x = torch.randn(4, 8)
    hold(
        m,
        a=torch.fft.fft(x),
        b=torch.fft.rfft(x),
        c=torch.fft.irfft(torch.fft.rfft(x)),
        d=torch.fft.fft2(x),
        e=torch.fft.fftshift(x),
        f=torch.fft.fftfreq(5),
    )
    hold(
        m,
        g=torch.stft(x, 4, return_complex=True, window=torch.hann_window(4)),
        h=torch.hamming_window(5),
        i=torch.kaiser_window(6),
        j=torch.fft.hfft(x),
    )
    hold(
        m,
        k=torch.istft(
            torch.stft(x, 4, return_complex=True, window=torch.hann_window(4)), 4, window=torch.hann_window(4)
        ),
    )
    m.weight = nn.Parameter(torch.fft.rfft(torch.randn(6)))


@idiom
def numbers_are_complex(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    m.b = nn.Parameter(torch.polar(torch.ones(3), torch.rand(3)))
    x = torch.randn(4, dtype=torch.complex128)
    hold(
        m,
        c=torch.view_as_real(m.a.data).clone(),
        d=m.a.data.conj().clone(),
        e=x.real,
        f=x.imag,
        g=x.abs(),
        h=x.angle(),
        i=torch.complex(torch.rand(2), torch.rand(2)),
    )
    m.a.data.real.fill_(1)
    m.a.data.imag[2:] = 3
    m.a.data.conj().mul_(2j)
    y = torch.view_as_complex(torch.randn(3, 2))
    hold(
        m,
        j=y.conj(),
        k=y.conj().imag,
        l=y.resolve_conj(),
        n=y.conj() @ y,
        o=torch.view_as_real(y),
        p=y.mH if y.dim() == 2 else y,
        q=x.conj().real,
        r=y * 1j,
    )
    hold(
        m,
        s=y.conj().conj(),
        t=torch.exp(1j * torch.rand(3)),
        u=(y.conj() + 1).tolist()[0].real,
        v=torch.randn(2, 2, dtype=torch.cfloat).H.contiguous(),
    )


@idiom
def values_are_sorted_and_searched(m: Any) -> None:
    x = torch.randn(5, 6)
    k = torch.randint(0, 6, (5, 2))
    hold(
        m,
        a=x.sort(dim=1).values,
        b=x.argsort(),
        c=x.topk(2).indices,
        d=torch.unique((x * 3).round()),
        e=x.masked_select(x > 0),
        f=x.gather(1, k),
    )
    hold(
        m,
        g=torch.bucketize(x, torch.linspace(-1, 1, 5)),
        h=torch.searchsorted(x.sort().values, x),
        i=x.cumsum(0),
        j=x.cummax(1).values,
        k=x.kthvalue(2).values,
    )
    hold(
        m,
        l=torch.unique(k, return_inverse=True, return_counts=True)[1],
        n=torch.unique_consecutive(k.flatten()),
        o=x.nonzero(),
        p=torch.count_nonzero(x),
        q=x.take(k),
    )
    hold(
        m,
        r=x.index_select(0, k[:2, 0].clamp(max=4)),
        s=torch.tril_indices(3, 3),
        t=torch.combinations(x[0]),
        u=torch.cartesian_prod(x[0, :2], x[1, :2]),
    )
    hold(
        m,
        v=x.take_along_dim(k, 1),
        w=torch.isin(k, torch.tensor([1, 2])),
        x=x.diff(),
        y=x.roll(1, 0),
        z=x.flip(1),
        ab=x.nanmedian(),
    )
    hold(
        m,
        ac=torch.stack(torch.where(x > 0)),
        ad=torch.nonzero(x > 0, as_tuple=True)[0],
        ae=x[x.argmax() // 6],
        af=torch.repeat_interleave(torch.tensor([1, 2])),
        ag=x.logcumsumexp(0),
    )
    hold(
        m,
        ah=torch.repeat_interleave(x, torch.tensor([1, 0, 2, 1, 1]), dim=0),
        ai=F.one_hot(k),
        aj=torch.meshgrid(x[0], x[1], indexing="ij")[0],
        ak=torch.histogram(x, 3)[0],
    )


@idiom
def functions_of_every_kind_are_computed(m: Any) -> None:
    x = torch.rand(2, 3, 8, 8)
    hold(
        m,
        a=F.interpolate(x, scale_factor=2, mode="bilinear"),
        b=F.interpolate(x, size=(5, 5), mode="bicubic"),
        c=torch.einsum("bchw,bchw->bc", x, x),
        d=F.pad(x, (1, 1, 1, 1), mode="reflect"),
    )
    hold(
        m,
        e=F.unfold(x, 3),
        f=F.grid_sample(x, torch.rand(2, 4, 4, 2), align_corners=False),
        g=F.affine_grid(torch.rand(2, 2, 3), [2, 3, 4, 4], align_corners=False),
        h=F.avg_pool2d(x, 2),
    )
    hold(
        m,
        i=F.max_pool2d(x, 2),
        j=F.adaptive_avg_pool2d(x, 3),
        k=F.softmax(x, 1),
        l=F.gelu(x),
        n=F.layer_norm(x, (8, 8)),
        o=F.normalize(x),
        p=F.cosine_similarity(x, x * 2),
        q=F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2),
    )
    hold(
        m,
        r=F.cross_entropy(x[:, :, 0, 0], torch.tensor([0, 2])),
        s=F.mse_loss(x, x * 2),
        t=torch.cdist(x[0, 0], x[0, 1]),
        u=torch.tensordot(x, x, dims=([1, 2, 3], [1, 2, 3])),
        v=x.logsumexp(1),
        w=x.var((2, 3)),
    )
    hold(
        m,
        y=F.embedding(torch.tensor([0, 1]), x[0, 0]),
        z=torch.special.erfinv(x * 0.9),
        aa=torch.erf(x),
        ab=x.lgamma(),
        ac=torch.bmm(x[0], x[1]),
        ad=torch.std_mean(x)[1],
        ae=x.norm(),
    )
    hold(
        m,
        af=F.conv2d(x, torch.rand(4, 3, 3, 3), padding=1),
        ag=F.conv_transpose2d(x, torch.rand(3, 4, 3, 3)),
        ah=F.linear(x, torch.rand(5, 8), torch.rand(5)),
        ai=F.group_norm(x, 3),
        aj=F.embedding_bag(torch.tensor([[0, 1]]), x[0, 0]),
    )
    hold(
        m,
        ak=F.ctc_loss(torch.rand(5, 1, 4).log_softmax(2), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])),
        al=torch.trapezoid(x),
        an=F.fold(F.unfold(x, 3), (8, 8), 3),
        ao=F.local_response_norm(x, 2),
    )


@idiom
def a_dummy_forward_goes_through_convolution_and_norm(m: Any) -> None:
    m.net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )
    with torch.no_grad():
        hold(m, out=m.net(torch.rand(2, 1, 6, 6)))
        hold(m, again=m.net.eval()(torch.rand(2, 1, 6, 6)))
    m.bn = nn.BatchNorm1d(3, momentum=None)
    m.bn(torch.rand(4, 3))
    hold(m, graph=m.net.train()(torch.rand(2, 1, 6, 6)).detach())


@idiom
def a_recurrent_network_is_run(m: Any) -> None:
    for name, net in {
        "lstm": nn.LSTM(5, 16, 2, batch_first=True, bidirectional=True),
        "gru": nn.GRU(5, 16),
        "rnn": nn.RNN(5, 16),
    }.items():
        setattr(m, name, net)
        x = torch.randn(3, 7, 5)
        hold(m, **{f"{name}_trained": net(x)[0].detach()})
        with torch.no_grad():
            hold(m, **{f"{name}_out": net(x)[0]})
            net.eval()
            hold(m, **{f"{name}_eval": net(x)[1][0]})
    m.cell = nn.LSTMCell(5, 16)
    hold(m, cell_out=m.cell(torch.randn(3, 5))[0].detach())
    m.projected = nn.LSTM(5, 16, proj_size=4, dropout=0.5, num_layers=2)
    hold(m, projected_out=m.projected(torch.randn(4, 2, 5))[0].detach())
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 5), torch.tensor([4, 2]))
    hold(m, packed=m.gru(packed)[0].data.detach(), padded=nn.utils.rnn.pad_sequence([torch.rand(2), torch.rand(3)]))
    m.after = nn.Parameter(torch.randn(3))


@idiom
def attention_is_run(m: Any) -> None:
    q, k, v = (torch.randn(2, 4, 33, 16) for _ in range(3))
    mask = torch.rand(33, 33) > 0.3
    hold(
        m,
        a=F.scaled_dot_product_attention(q, k, v),
        b=F.scaled_dot_product_attention(q, k, v, is_causal=True),
        c=F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    )
    hold(m, d=F.scaled_dot_product_attention(q, k, v, dropout_p=0.3))
    m.mha = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    hold(m, e=m.mha(x, x, x)[0].detach(), f=m.mha(x, x, x, need_weights=False)[0].detach())
    with torch.no_grad():
        m.mha.eval()
        hold(m, g=m.mha(x, x, x, need_weights=False)[0], h=m.mha(x, x, x)[1])
    m.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    hold(m, i=m.encoder(x).detach())
    with torch.no_grad():
        m.encoder.eval()
        hold(m, j=m.encoder(x), k=m.encoder(x, src_key_padding_mask=torch.arange(9).expand(2, 9) > 6))
    m.decoder = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
    hold(m, l=m.decoder(x, x).detach())
    m.after = nn.Parameter(torch.randn(3))


@idiom
def gradients_are_computed(m: Any) -> None:
    m.a = nn.Linear(4, 4)
    target = F.normalize(torch.randn(4, 4), dim=0)
    loss = (m.a.weight - target).square().sum()
    (gradient,) = torch.autograd.grad(loss, m.a.weight)
    with torch.no_grad():
        m.a.weight.sub_(gradient, alpha=0.1)
    m.b = nn.Linear(3, 2)
    m.b(torch.rand(5, 3)).pow(2).sum().backward()
    hold(m, gradient=m.b.weight.grad, norm=m.b.bias.grad.norm())
    x = torch.rand(3, requires_grad=True)
    hold(
        m,
        jacobian=torch.autograd.functional.jacobian(lambda t: t**2, x.detach()),
        hessian=torch.autograd.functional.hessian(lambda t: (t**3).sum(), x.detach()),
    )
    y = (x**3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    hold(m, second=second, vjp=torch.autograd.functional.vjp(lambda t: t.sin(), x.detach(), torch.ones(3))[1])
    m.b.zero_grad()


class _Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 2 + x


@idiom
def gradients_go_through_own_functions_and_checkpoints(m: Any) -> None:
    x = torch.rand(3, requires_grad=True)
    _Doubling.apply(x).sum().backward()
    m.a = nn.Linear(3, 3)
    out = torch.utils.checkpoint.checkpoint(m.a, torch.rand(2, 3), use_reentrant=False)
    out.sum().backward()
    hold(m, gradient=x.grad, other=m.a.weight.grad)
    m.a.zero_grad()


@idiom.on_host("eager torch crashes in a Hessian by functorch on a device of another package")
def functions_are_transformed(m: Any) -> None:
    x = torch.rand(3, 4)
    hold(
        m,
        a=torch.vmap(lambda t: t @ t)(x),
        b=torch.func.grad(lambda t: (t**2).sum())(x),
        c=torch.func.jacrev(lambda t: t**2)(x[0]),
        d=torch.func.hessian(lambda t: (t**3).sum())(x[0]),
    )
    layers = [nn.Linear(4, 2) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(layers)
    m.weight, m.bias = nn.Parameter(parameters["weight"].detach()), nn.Parameter(parameters["bias"].detach())
    base = nn.Linear(4, 2)
    hold(
        m,
        e=torch.func.functional_call(base, {"weight": torch.ones(2, 4)}, (x,)).detach(),
        f=torch.func.jvp(torch.sin, (x,), (x,))[1],
    )
    hold(
        m,
        g=torch.vmap(
            lambda w, b, t: torch.func.functional_call(base, {"weight": w, "bias": b}, (t,)), in_dims=(0, 0, None)
        )(*(parameters[k] for k in ("weight", "bias")), x).detach(),
    )
    hold(
        m,
        h=torch.vmap(lambda t: t + torch.rand(4), randomness="different")(x),
        i=torch.vmap(torch.linalg.inv)(torch.rand(2, 3, 3) + torch.eye(3)),
        j=torch.func.jacfwd(torch.sin)(x[0]),
    )


@idiom.each
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
def test_computed_values_are_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
