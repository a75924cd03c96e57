"""Constructors that draw, seed and fork."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.quasirandom import SobolEngine

from tests.deferred.idioms.idiom import Body, Idioms, assert_idiom_is_exact, hold

idiom = Idioms()


@idiom
def the_stream_is_seeded_forked_and_restored(m: Any) -> None:
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
    hold(m, seed=torch.initial_seed())


@idiom
def the_stream_is_forked_without_a_seed(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    with torch.random.fork_rng():
        m.b = nn.Parameter(torch.randn(30))
        with torch.random.fork_rng():
            m.c = nn.Parameter(torch.randn(5))
        m.d = nn.Parameter(torch.randn(5))
    m.e = nn.Parameter(torch.randn(5))


@idiom
def a_state_is_held_as_a_buffer(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    hold(m, state=torch.get_rng_state(), other=torch.default_generator.get_state())


@idiom
def a_state_is_looked_into(m: Any) -> None:
    torch.randn(3)
    state = torch.get_rng_state()
    hold(
        m,
        sum=int(state.long().sum()),
        bytes=state.numpy()[:100].tolist(),
        same=torch.equal(state, torch.get_rng_state()),
    )


@idiom
def a_state_goes_to_another_generator(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(7))
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    m.b = nn.Parameter(torch.randn(7, generator=generator))
    m.c = nn.Parameter(torch.randn(7))
    torch.set_rng_state(generator.get_state())
    m.d = nn.Parameter(torch.randn(7))
    copied = torch.get_rng_state().clone()
    m.e = nn.Parameter(torch.randn(7))
    torch.set_rng_state(copied)
    m.f = nn.Parameter(torch.randn(7))


@idiom
def generators_are_explicit(m: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    m.a = nn.Parameter(torch.randn(20, generator=generator))
    m.b = nn.Parameter(torch.empty(20).uniform_(generator=generator))
    m.c = nn.Parameter(nn.init.trunc_normal_(torch.empty(30), generator=generator))
    m.d = nn.Parameter(torch.randn(4))
    hold(
        m,
        e=torch.randperm(6, generator=generator),
        f=torch.rand(3, generator=generator),
        g=torch.bernoulli(torch.rand(4), generator=generator),
    )
    hold(
        m,
        h=torch.multinomial(torch.rand(5), 2, generator=generator),
        i=torch.normal(torch.zeros(3), 1.0, generator=generator),
    )
    hold(m, j=torch.randint(0, 9, (3,), generator=generator), k=generator.initial_seed())
    nn.init.kaiming_normal_(torch.empty(3, 3), generator=generator)
    m.l = nn.Parameter(nn.init.orthogonal_(torch.empty(3, 3), generator=generator))


@idiom
def generators_are_cloned(m: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    m.a = nn.Parameter(torch.randn(5, generator=generator))
    clone = generator.clone_state()
    m.b = nn.Parameter(torch.randn(5, generator=generator))
    m.c = nn.Parameter(torch.randn(5, generator=clone))
    default = torch.default_generator.clone_state()
    m.d = nn.Parameter(torch.randn(5))
    m.e = nn.Parameter(torch.randn(5, generator=default))


@idiom
def generators_are_copied(m: Any) -> None:
    generator = torch.Generator().manual_seed(4)
    m.a = nn.Parameter(torch.randn(5, generator=generator))
    other = torch.Generator()
    other.set_state(generator.get_state())
    m.b = nn.Parameter(torch.randn(5, generator=other))
    m.c = nn.Parameter(torch.randn(5, generator=generator))


@idiom
def a_generator_is_seeded_again(m: Any) -> None:
    generator = torch.Generator()
    for i in range(3):
        generator.manual_seed(i)
        m.register_parameter(f"p{i}", nn.Parameter(torch.randn(5, generator=generator)))
    generator.manual_seed(0)
    m.last = nn.Parameter(torch.randn(5, generator=generator))


@idiom
def a_generator_outlives_the_constructor(m: Any) -> None:
    m.generator = torch.Generator().manual_seed(5)
    m.a = nn.Parameter(torch.randn(5, generator=m.generator))
    m.other = torch.Generator().manual_seed(6)
    torch.randn(3, generator=m.other)
    hold(m, state=m.generator.get_state())


@idiom
def python_randomness_is_mixed_in(m: Any) -> None:
    random.seed(0)
    m.a = nn.Parameter(torch.full((random.randint(2, 5),), random.random()))
    m.b = nn.Parameter(torch.randn(3) * random.gauss(0, 1))
    random.seed(torch.initial_seed())
    m.c = nn.ModuleList(random.sample([nn.Linear(1, i + 1) for i in range(4)], 2))


@idiom
def every_distribution_is_drawn_in_place(m: Any) -> None:
    for name, args in {
        "uniform_": (-2, 3), "normal_": (1, 2), "exponential_": (), "bernoulli_": (0.3,), "log_normal_": (),
        "cauchy_": (), "geometric_": (0.4,), "random_": (3, 9),
    }.items():  # fmt: skip
        for size in ((5,), (7, 9)):
            hold(m, **{f"{name}{len(size)}": getattr(torch.empty(size), name)(*args)})
    hold(m, a=torch.zeros(5, dtype=torch.int64).random_(), b=torch.zeros(5, dtype=torch.bool).bernoulli_())
    hold(m, c=torch.rand(4).bernoulli_(torch.rand(4)), d=torch.zeros(3, dtype=torch.float64).random_(10))


@idiom
def every_distribution_is_drawn(m: Any) -> None:
    p = torch.rand(3, 4)
    hold(
        m,
        a=torch.bernoulli(p),
        b=torch.multinomial(p, 2),
        c=torch.multinomial(p, 6, replacement=True),
        d=torch.poisson(p * 5),
    )
    hold(m, e=torch.normal(p, p), f=torch.normal(0.0, p), g=torch.normal(1.0, 2.0, (3, 3)), h=torch.randint(3, 9, (4,)))
    hold(
        m,
        i=torch.randperm(7),
        j=torch.rand_like(p),
        k=torch.randn_like(p),
        l=torch.randint_like(p, 5),
        n=torch.randint(7, (2,)),
    )
    hold(
        m,
        o=torch._standard_gamma(p),
        q=torch.binomial(torch.full((3,), 9.0), torch.rand(3)),
        r=torch._sample_dirichlet(p),
    )
    hold(
        m,
        s=torch.rand(3, dtype=torch.float64),
        t=torch.randn(20, dtype=torch.bfloat16),
        u=torch.randn(5, dtype=torch.complex64),
    )
    hold(
        m,
        v=torch.rand(17, dtype=torch.float16),
        w=torch.randperm(5, dtype=torch.int32),
        x=torch.rand(2, 3).t().bernoulli(),
    )


@idiom
def dropout_is_applied(m: Any) -> None:
    x = torch.ones(4, 4, 4)
    hold(
        m,
        a=F.dropout(x, 0.5),
        b=F.dropout1d(x, 0.5),
        c=F.alpha_dropout(x, 0.3),
        d=nn.Dropout(0.2)(x),
        e=F.feature_alpha_dropout(x),
    )
    hold(
        m,
        f=F.rrelu(x - 2, training=True),
        g=F.gumbel_softmax(x, hard=True),
        h=F.dropout(x, training=False),
        i=F.fractional_max_pool2d(x, 2, 3),
    )
    y = torch.ones(20)
    torch.dropout_(y, 0.5, True)
    F.rrelu_(y, training=True)
    hold(m, y=y)


@idiom
def torch_distributions_are_sampled(m: Any) -> None:
    d = torch.distributions
    hold(
        m,
        a=d.Normal(0.0, 1.0).sample((3,)),
        b=d.Gamma(torch.tensor([2.0]), torch.tensor([1.0])).sample((4,)),
        c=d.Beta(2.0, 3.0).rsample((3,)),
    )
    hold(
        m,
        d=d.Categorical(torch.rand(5)).sample((6,)),
        e=d.MultivariateNormal(torch.zeros(3), torch.eye(3)).sample(),
        f=d.Uniform(0, 1).sample((2,)),
    )
    hold(
        m,
        g=d.Dirichlet(torch.ones(3)).sample(),
        h=d.Laplace(0.0, 1.0).sample((4,)),
        i=d.StudentT(3.0).sample((4,)),
        j=d.Poisson(4.0).sample((3,)),
    )
    hold(
        m,
        k=d.LKJCholesky(3, 0.5).sample(),
        l=d.VonMises(0.0, 1.0).sample((5,)),
        n=d.Bernoulli(0.3).sample((5,)),
        o=d.HalfCauchy(1.0).sample((3,)),
    )
    hold(
        m,
        p=d.Normal(torch.zeros(2), torch.ones(2)).log_prob(torch.rand(2)),
        q=d.Weibull(1.0, 2.0).sample((3,)),
        r=d.Binomial(10, torch.tensor(0.5)).sample((4,)),
    )
    hold(m, t=d.OneHotCategorical(torch.rand(4)).sample(), u=d.kl_divergence(d.Normal(0.0, 1.0), d.Normal(1.0, 2.0)))
    m.prior = d.Normal(torch.zeros(2), torch.ones(2))


@idiom
def sobol_sequences_are_drawn(m: Any) -> None:
    m.engine = SobolEngine(3, scramble=True, seed=4)
    hold(m, a=m.engine.draw(4))
    other = SobolEngine(2, scramble=True)
    other.fast_forward(3)
    hold(m, b=other.draw(5), c=SobolEngine(4).draw(3), d=other.sobolstate, e=m.engine.shift)
    m.after = nn.Parameter(torch.randn(3))


@idiom
def truncated_normals_reject_much(m: Any) -> None:
    m.a = nn.Parameter(nn.init.trunc_normal_(torch.empty(37), std=1.0, a=-0.1, b=0.1))
    m.b = nn.Parameter(torch.rand(2))
    m.c = nn.Parameter(nn.init.trunc_normal_(torch.empty(300), std=0.02))
    m.d = nn.Parameter(nn.init.trunc_normal_(torch.empty(6, 5, dtype=torch.float64), std=3.0, a=-1, b=2))
    m.e = nn.Parameter(nn.init.trunc_normal_(torch.empty(3, 4, dtype=torch.bfloat16).t()))
    m.after = nn.Parameter(torch.randn(3))


@idiom
def a_loop_of_my_own_rejects(m: Any) -> None:
    x = torch.randn(50)
    while bool((bad := x.abs() > 1.5).any()):
        x[bad] = torch.randn(int(bad.sum()))
    m.x = nn.Parameter(x)
    y = torch.empty(20, 4).normal_()
    good = (y < 2) & (y > -2)
    index = good.max(-1, keepdim=True)[1]
    m.y = nn.Parameter(y.gather(-1, index).squeeze(-1))


@idiom
def initializers_of_every_kind(m: Any) -> None:
    initializers: dict[str, Callable[[Tensor], Any]] = {
        "kaiming_normal": lambda t: nn.init.kaiming_normal_(t, mode="fan_out", nonlinearity="relu"),
        "orthogonal": lambda t: nn.init.orthogonal_(t, gain=2),
        "sparse": lambda t: nn.init.sparse_(t, 0.4),
        "xavier_uniform": nn.init.xavier_uniform_,
        "trunc_normal": nn.init.trunc_normal_,
        "eye": nn.init.eye_,
    }
    for name, initialize in initializers.items():
        for size in ((3, 3), (37, 29)):
            hold(m, **{f"{name}_{size[0]}": initialize(torch.empty(size, dtype=torch.float64))})
    hold(m, dirac=nn.init.dirac_(torch.empty(4, 2, 3)), dirac2=nn.init.dirac_(torch.empty(4, 2, 3, 3), groups=2))


@idiom
def a_seed_comes_from_the_operating_system_and_is_replaced(m: Any) -> None:
    torch.seed()
    torch.randn(3)
    torch.manual_seed(3)
    m.a = nn.Parameter(torch.randn(3))
    torch.default_generator.seed()
    torch.random.manual_seed(4)
    m.b = nn.Parameter(torch.randn(3))


@idiom
def a_cached_gaussian_is_carried_over(m: Any) -> None:
    m.a = nn.Parameter(torch.randn(3))
    m.b = nn.Parameter(torch.randn(1))
    state = torch.get_rng_state()
    m.c = nn.Parameter(torch.randn(1))
    m.d = nn.Parameter(torch.randn(20))
    torch.set_rng_state(state)
    m.e = nn.Parameter(torch.randn(2))
    m.f = nn.Parameter(torch.normal(0, 1, (3, 5)).t().normal_())


@idiom
def copies_are_drawn_anew(m: Any) -> None:
    m.layers = nn.ModuleList(copy.deepcopy(nn.Linear(4, 4)) for _ in range(3))
    for layer in m.layers:
        layer.reset_parameters()
    m.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)


@idiom.each
def test_randomness_is_exact(body: Body) -> None:
    assert_idiom_is_exact(body)
