"""Random constructors: sequences of everything that is done to tensors, drawn by hypothesis."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.device import ON_CPU, device

#: One instruction: what to do, with which tensors (by number, modulo how many there are), and a parameter.
Instruction = tuple[str, int, int, int]
_SHAPES = [(), (3,), (4, 3), (2, 3, 2), (17,), (0, 3), (1, 5)]
_DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Machine:
    """Executes instructions; what it holds at the end becomes buffers of a module."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = [torch.zeros(4, 3)]
        self.reads: list[float] = []
        self.generator = torch.Generator().manual_seed(3)
        self.state = torch.get_rng_state()

    def run(self, instruction: Instruction) -> None:
        name, first, second, number = instruction
        x = self.tensors[first % len(self.tensors)]
        y = self.tensors[second % len(self.tensors)]
        try:
            made = OPERATIONS[name](self, x, y, number)
        except (RuntimeError, IndexError, TypeError, ValueError):
            # What torch refuses, it must refuse both ways: nothing changes.
            self.reads.append(-1.0)
            return
        if isinstance(made, Tensor):
            self.tensors.append(made)


def _write(change: Callable[[Tensor], Any]) -> Callable[[Machine, Tensor, Tensor, int], None]:
    def write(m: Machine, x: Tensor, y: Tensor, n: int) -> None:
        with torch.no_grad():
            change(x)

    return write


def _read(m: Machine, value: float) -> None:
    m.reads.append(float(value))


def _numpy_write(m: Machine, x: Tensor, y: Tensor, n: int) -> None:
    array = x.detach().numpy()
    if array.size:
        array.reshape(-1)[n % array.size] = n
    m.reads.append(float(np.nansum(array)))


def _out(m: Machine, x: Tensor, y: Tensor, n: int) -> None:
    # A larger result takes new memory, and what shared the old one by DLPack is left with what is freed.
    if x.numel() <= y.numel():
        torch.add(x.detach(), 1, out=y.detach())


def _assign(m: Machine, x: Tensor, y: Tensor, n: int) -> None:
    x.data = y.detach()


def _seed(generator: torch.Generator, n: int) -> None:
    generator.manual_seed(n)


def _fork(m: Machine, x: Tensor, y: Tensor, n: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(n)
        return torch.randn(n % 20)


def _save_state(m: Machine, x: Tensor, y: Tensor, n: int) -> None:
    m.state = torch.get_rng_state()


OPERATIONS: dict[str, Callable[[Machine, Tensor, Tensor, int], Any]] = {
    "zeros": lambda m, x, y, n: torch.zeros(_SHAPES[n % 7], dtype=_DTYPES[n % 3]),
    "empty": lambda m, x, y, n: torch.empty(_SHAPES[n % 7], dtype=_DTYPES[n % 3]).fill_(n),
    "arange": lambda m, x, y, n: torch.arange(n, dtype=torch.float32),
    "rand": lambda m, x, y, n: torch.rand(_SHAPES[n % 7], dtype=_DTYPES[n % 3]),
    "randn": lambda m, x, y, n: torch.randn(_SHAPES[n % 7], dtype=_DTYPES[n % 3]),
    "randn from a generator": lambda m, x, y, n: torch.randn(_SHAPES[n % 7], generator=m.generator),
    "randperm": lambda m, x, y, n: torch.randperm(n),
    "constant": lambda m, x, y, n: torch.tensor([float(n), 1.0]),
    "linear": lambda m, x, y, n: nn.Linear(3, n % 5 + 1).weight.detach(),
    "view": lambda m, x, y, n: x.view(-1),
    "transpose": lambda m, x, y, n: x.t(),
    "slice": lambda m, x, y, n: x[n % 3 :: 2],
    "select": lambda m, x, y, n: x[n % 4],
    "expand": lambda m, x, y, n: x.unsqueeze(0).expand(2, *x.shape),
    "diagonal": lambda m, x, y, n: x.diagonal(),
    "as_strided": lambda m, x, y, n: x.as_strided((2, 2), (2, 1), n % 3),
    "unfold": lambda m, x, y, n: x.unfold(0, 2, 1),
    "bytes": lambda m, x, y, n: x.view(torch.uint8).clone(),
    "detach": lambda m, x, y, n: x.detach(),
    "clone": lambda m, x, y, n: x.clone(),
    "contiguous": lambda m, x, y, n: x.contiguous(),
    "deepcopy": lambda m, x, y, n: copy.deepcopy(x),
    "double": lambda m, x, y, n: x.double(),
    "parameter": lambda m, x, y, n: nn.Parameter(x.float()).detach(),
    "add": lambda m, x, y, n: x + y,
    "multiply": lambda m, x, y, n: x * 1.5 - n,
    "matmul": lambda m, x, y, n: x @ y.t(),
    "cat": lambda m, x, y, n: torch.cat([x, y]),
    "where": lambda m, x, y, n: torch.where(x > 0, x, -x),
    "softmax": lambda m, x, y, n: F.softmax(x, -1),
    "sort": lambda m, x, y, n: x.sort().values,
    "nonzero": lambda m, x, y, n: x[x > 0.5],
    "qr": lambda m, x, y, n: torch.linalg.qr(x)[0],
    "sum": lambda m, x, y, n: x.sum(),
    "pick": lambda m, x, y, n: x[torch.randint(0, max(len(x), 1), (3,))],
    "bernoulli": lambda m, x, y, n: torch.bernoulli(x),
    "dropout": lambda m, x, y, n: F.dropout(x, 0.5),
    "add in place": lambda m, x, y, n: _write(lambda t: t.add_(y))(m, x, y, n),
    "copy in place": lambda m, x, y, n: _write(lambda t: t.copy_(y))(m, x, y, n),
    "multiply in place": lambda m, x, y, n: _write(lambda t: t.mul_(0.5))(m, x, y, n),
    "zero": lambda m, x, y, n: _write(lambda t: t.zero_())(m, x, y, n),
    "fill a part": lambda m, x, y, n: _write(lambda t: t[: n % 3].fill_(n))(m, x, y, n),
    "set where": lambda m, x, y, n: _write(lambda t: t.__setitem__(t > 1, 0.25))(m, x, y, n),
    "normal in place": lambda m, x, y, n: _write(lambda t: t.normal_())(m, x, y, n),
    "uniform in place": lambda m, x, y, n: _write(lambda t: t.uniform_(-1, n))(m, x, y, n),
    "uniform from a generator": lambda m, x, y, n: _write(lambda t: t.uniform_(generator=m.generator))(m, x, y, n),
    "truncated normal": lambda m, x, y, n: _write(lambda t: nn.init.trunc_normal_(t, std=0.5, a=-1, b=1))(m, x, y, n),
    "kaiming": lambda m, x, y, n: _write(nn.init.kaiming_uniform_)(m, x, y, n),
    "assign data": _assign,
    "item": lambda m, x, y, n: _read(m, x.reshape(-1)[n % max(x.numel(), 1)].item()),
    "tolist": lambda m, x, y, n: _read(m, len(str(x.double().tolist()))),
    "equal": lambda m, x, y, n: _read(m, torch.equal(x, y)),
    "branch": lambda m, x, y, n: torch.rand(2) if bool((x > 0.1).any()) else torch.randn(3),
    "numpy": _numpy_write,
    "from numpy": lambda m, x, y, n: torch.from_numpy(np.arange(float(n))),
    "scale by a read": lambda m, x, y, n: _write(lambda t: t.mul_(1 / (1 + abs(float(t.float().sum())))))(m, x, y, n),
    "pickle": lambda m, x, y, n: pickle.loads(pickle.dumps(x)),
    "copy": lambda m, x, y, n: copy.copy(x),
    "dlpack": lambda m, x, y, n: torch.from_dlpack(x),
    "storage": lambda m, x, y, n: _read(m, x.untyped_storage().nbytes() + (x.untyped_storage()[0] if x.numel() else 0)),
    "set": lambda m, x, y, n: _write(lambda t: t.set_(y.detach()))(m, x, y, n),
    "resize": lambda m, x, y, n: _write(lambda t: t.resize_(n % 6).fill_(n))(m, x, y, n),
    "same bytes": lambda m, x, y, n: x.view(torch.uint8),
    "rows of a list": lambda m, x, y, n: x[[0, n % 3]],
    "put": lambda m, x, y, n: _write(lambda t: t.index_put_((torch.tensor([n % 3]),), torch.rand(())))(m, x, y, n),
    "cumsum in place": lambda m, x, y, n: _write(lambda t: t.cumsum_(0))(m, x, y, n),
    "out": _out,
    "multinomial": lambda m, x, y, n: torch.multinomial(x.abs() + 0.1, 2),
    "seed": lambda m, x, y, n: _seed(torch.default_generator, n),
    "seed the generator": lambda m, x, y, n: _seed(m.generator, n),
    "fork": _fork,
    "save the state": _save_state,
    "restore the state": lambda m, x, y, n: torch.set_rng_state(m.state),
}

if not ON_CPU:
    OPERATIONS |= {
        "to the host": lambda m, x, y, n: x.cpu(),
        "from the host": lambda m, x, y, n: x.cpu().to(device()),
        "as another": lambda m, x, y, n: x.to(y),
        "rand on the host": lambda m, x, y, n: torch.rand(_SHAPES[n % 7], device="cpu"),
        "rand on the device": lambda m, x, y, n: torch.rand(_SHAPES[n % 7], device=device()),
        "rand like": lambda m, x, y, n: torch.rand_like(x),
        "new full": lambda m, x, y, n: x.new_full((2, 3), n),
    }

programs = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 30), st.integers(0, 30), st.integers(0, 20)),
    min_size=1,
    max_size=25,
)


class Program(nn.Module):
    """A module whose constructor executes instructions."""

    def __init__(self, instructions: list[Instruction]) -> None:
        super().__init__()
        machine = Machine()
        for instruction in instructions:
            machine.run(instruction)
        for number, tensor in enumerate(machine.tensors):
            self.register_buffer(f"t{number}", tensor)
        self.register_buffer("reads", torch.tensor(machine.reads, dtype=torch.float64))
