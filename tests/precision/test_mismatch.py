"""Dtype mismatches in forward: errors name the tensors that a precision does not cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nucleate import Runtime
from nucleate.errors import DtypeMismatchError, UsageError
from nucleate.precision import FixedDtype
from nucleate.precision.mismatch import explain_mismatch
from tests.device import ACCELERATOR

pytestmark = pytest.mark.usefixtures("factories_on_device")

#: An operation of torch on hidden states `(4, 4)` and a table `(4, 4)` of another dtype, which torch refuses.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mm": torch.mm,
    "mv": lambda x, table: x @ table[0],
    "dot": lambda x, table: torch.dot(x[0], table[0]),
    "vdot": lambda x, table: torch.vdot(x[0], table[0]),
    "bmm": lambda x, table: torch.bmm(x[None], table[None]),
    "addmm": lambda x, table: torch.addmm(x, x, table),
    "addmm of the sum": lambda x, table: torch.addmm(table, x, x),
    "addmv": lambda x, table: torch.addmv(x[0], x, table[0]),
    "addbmm": lambda x, table: torch.addbmm(x, x[None], table[None]),
    "baddbmm": lambda x, table: torch.baddbmm(x[None], x[None], table[None]),
    "einsum": lambda x, table: torch.einsum("ij,jk->ik", x, table),
    "tensordot": lambda x, table: torch.tensordot(x, table, 1),
    "linear": F.linear,
    "linear of the sum": lambda x, table: F.linear(x + table, x),
    "linear with bias": lambda x, table: F.linear(x, x, table[0]),
    "bilinear": lambda x, table: F.bilinear(x, x, table[None]),
    "conv1d": lambda x, table: F.conv1d(x[None], table[..., None]),
    "conv1d with bias": lambda x, table: F.conv1d(x[None], x[..., None], table[0]),
    "conv2d": lambda x, table: F.conv2d(x[None, None], table[None, None]),
    "conv3d": lambda x, table: F.conv3d(x[None, None, None], table[None, None, None]),
    "conv_transpose1d": lambda x, table: F.conv_transpose1d(x[None], table[..., None]),
    "conv_transpose2d": lambda x, table: F.conv_transpose2d(x[None, None], table[None, None]),
    "layer_norm of the sum": lambda x, table: F.layer_norm(x + table, (4,), x[0], x[1]),
    "layer_norm, one of two": lambda x, table: F.layer_norm(x, (4,), x[0], table[1]),
    "group_norm of the sum": lambda x, table: F.group_norm(x + table, 2, x[0], x[1]),
    "instance_norm of the sum": lambda x, table: F.instance_norm((x + table)[None], weight=x[0], bias=x[1]),
    "batch_norm": lambda x, table: F.batch_norm(x, table[0], table[1].abs(), x[0], x[1]),
    "prelu": lambda x, table: F.prelu(x, table[0]),
    "lerp": lambda x, table: torch.lerp(x, table, 0.5),
    "lerp by a weight": lambda x, table: torch.lerp(x, x, table),
    "attention": lambda x, table: F.scaled_dot_product_attention(*[x[None, None]] * 2, table[None, None]),
    "attention by keys": lambda x, table: F.scaled_dot_product_attention(
        x[None, None], table[None, None], x[None, None]
    ),
    "attention with a mask": lambda x, table: F.scaled_dot_product_attention(*[table[None, None]] * 3, attn_mask=x),
    "embedding_bag": lambda x, table: F.embedding_bag(
        torch.zeros(4, 4, dtype=torch.long), x, mode="sum", per_sample_weights=table
    ),
    "index_put": lambda x, table: table.clone().index_put_((torch.tensor([0]),), x[:1]),
    "assignment at indices": lambda x, table: table.clone().__setitem__(torch.tensor([0, 2]), x[:2]),
    "index_add": lambda x, table: table.index_add(0, torch.tensor([0, 1]), x[:2]),
    "index_copy": lambda x, table: table.index_copy(0, torch.tensor([0, 1]), x[:2]),
    "scatter": lambda x, table: table.scatter(0, torch.zeros(4, 4, dtype=torch.long), x),
    "scatter_add": lambda x, table: table.scatter_add(0, torch.zeros(4, 4, dtype=torch.long), x),
    "scatter_reduce": lambda x, table: table.scatter_reduce(0, torch.zeros(4, 4, dtype=torch.long), x, "amax"),
    "masked_scatter": lambda x, table: table.masked_scatter(torch.ones(4, 4, dtype=torch.bool), x),
    "grid_sample": lambda x, table: F.grid_sample(x[None, None], table.view(1, 2, 4, 2), align_corners=False),
    "solve": lambda x, table: torch.linalg.solve(x + torch.eye(4, dtype=x.dtype), table),
    "vecdot": torch.linalg.vecdot,
    "inner": torch.inner,
    "multi_dot": lambda x, table: torch.linalg.multi_dot([x, table, x]),
    "cross_entropy with weights": lambda x, table: F.cross_entropy(x, torch.zeros(4, dtype=torch.long), table[0]),
    "binary_cross_entropy": lambda x, table: F.binary_cross_entropy(x.sigmoid(), table),
    "heaviside": torch.heaviside,
    "put": lambda x, table: table.clone().put_(torch.tensor([0, 1]), x[0, :2]),
    "index_reduce": lambda x, table: table.index_reduce(0, torch.tensor([0, 1]), x[:2], "amax"),
    "transformer layer": lambda x, table: nn.TransformerEncoderLayer(4, 2, 8, dtype=x.dtype).eval()((x + table)[None]),
    "checkpointed": lambda x, table: checkpoint(torch.mm, x, table, use_reentrant=False),
    "vmap": lambda x, table: torch.func.vmap(lambda row: table @ row)(x),
}


class Net(nn.Module):
    """A model with a table that it combines with hidden states."""

    def __init__(self, operation: Callable[[Tensor, Tensor], Any], table: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.operation = operation
        self.body = nn.Linear(4, 4)
        self.positions = nn.Module()
        self.positions.register_buffer("table", torch.ones(4, 4, dtype=table))

    def forward(self, x: Tensor) -> Any:
        return self.operation(self.body(x), self.positions.table)


def set_up(model: nn.Module, precision: str) -> Any:
    return Runtime(accelerator=ACCELERATOR, strategy="single_device", precision=precision).setup(model)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kind_of_mismatch_names_the_buffer_and_the_cure(name: str, precision: str) -> None:
    half = torch.bfloat16 if precision == "bf16-true" else torch.float16
    x = torch.ones(4, 4)
    # torch's own error comes first: what this explains is what torch refuses.
    with pytest.raises((RuntimeError, ValueError)) as original:
        OPERATIONS[name](x.to(half), torch.ones(4, 4))
    with pytest.raises(DtypeMismatchError) as raised:
        set_up(Net(OPERATIONS[name]), precision)(x)
    message = str(raised.value)
    assert str(original.value).splitlines()[0].rstrip(".") in message
    assert f"Precision {precision!r} computes in {half}" in message
    assert "positions.table (torch.float32)" in message
    assert "`self.table.to(x.dtype)`" in message
    assert type(raised.value.__cause__) is type(original.value)


@pytest.mark.parametrize("layer", [nn.LSTM(4, 4), nn.GRU(4, 4), nn.RNN(4, 4)], ids=lambda layer: type(layer).__name__)
def test_recurrent_layers_raise_a_value_error_which_is_explained_too(layer: nn.Module) -> None:
    model = Net(lambda x, table: layer(x + table))
    model.layer = layer
    with pytest.raises(ValueError, match=r"positions\.table \(torch\.float32\)") as raised:
        set_up(model, "bf16-true")(torch.ones(4, 4))
    assert type(raised.value) is DtypeMismatchError


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "16-mixed"])
def test_a_double_table_is_named_under_every_precision_that_computes_in_less(precision: str) -> None:
    with pytest.raises(DtypeMismatchError, match=r"positions\.table \(torch\.float64\)"):
        set_up(Net(lambda x, table: F.linear(x + table, x), torch.float64), precision)(torch.ones(4, 4))


def test_a_float_table_is_named_under_double_precision() -> None:
    with pytest.raises(DtypeMismatchError, match=r"computes in torch\.float64 .*positions\.table \(torch\.float32\)"):
        set_up(Net(F.linear), "64-true")(torch.ones(4, 4))


def test_it_is_a_runtime_error_as_torchs_is() -> None:
    with pytest.raises(RuntimeError, match="must have the same dtype|expected m1 and m2 to have the same dtype"):
        set_up(Net(F.linear), "bf16-true")(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("cure", "dtype"),
    [(lambda x, table: F.linear(x + table.to(x.dtype), x), torch.float32), (F.linear, torch.bfloat16)],
    ids=["cast", "dtype"],
)
def test_the_cures_that_it_names_work(cure: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    assert set_up(Net(cure, dtype), "bf16-true")(torch.ones(4, 4)).dtype == torch.float32


def test_a_buffer_that_is_made_inside_a_block_without_a_dtype_has_the_precisions() -> None:
    class Inside(Net):
        def __init__(self) -> None:
            super().__init__(F.linear)
            self.positions.register_buffer("table", torch.ones(4, 4))

    runtime = Runtime(accelerator=ACCELERATOR, strategy="single_device", precision="bf16-true")
    with runtime.init_module(empty_init=True):
        model = Inside()
    assert runtime.setup(model)(torch.ones(4, 4)).dtype == torch.float32


def test_tensors_that_are_plain_attributes_are_named() -> None:
    class Attribute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.table = torch.ones(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(self.body(x) + self.table)

    with pytest.raises(DtypeMismatchError, match=r": table \(torch\.float32\)\."):
        set_up(Attribute(), "bf16-true")(torch.ones(4, 4))


def no_buffer(x: Tensor, table: Tensor) -> Tensor:
    return F.linear(x, torch.ones(4, 4))


def another_error(x: Tensor, table: Tensor) -> Tensor:
    raise RuntimeError("the file of float32 numbers is not there")


def another_shape(x: Tensor, table: Tensor) -> Tensor:
    return x @ torch.ones(3, 3, dtype=x.dtype)


def an_index(x: Tensor, table: Tensor) -> Tensor:
    return F.embedding(x, x)


def a_target(x: Tensor, table: Tensor) -> Tensor:
    return F.nll_loss(x, x[:, 0])


def ours(x: Tensor, table: Tensor) -> Tensor:
    raise UsageError("got float32, takes bfloat16: they must have the same dtype")


@pytest.mark.parametrize("fault", [another_error, another_shape, an_index, a_target, ours])
def test_other_errors_pass_unchanged(fault: Callable[[Tensor, Tensor], Any]) -> None:
    half = torch.ones(4, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as original:
        fault(half, torch.ones(4, 4))
    with pytest.raises(RuntimeError) as raised:
        set_up(Net(fault), "bf16-true")(torch.ones(4, 4))
    assert type(raised.value) is type(original.value)
    assert str(raised.value) == str(original.value)


def test_without_such_a_buffer_a_mismatch_passes_unchanged() -> None:
    with pytest.raises(RuntimeError) as raised:
        set_up(Net(no_buffer, torch.bfloat16), "bf16-true")(torch.ones(4, 4))
    assert type(raised.value) is RuntimeError
    # The table has a dtype that the message does not name.
    with pytest.raises(RuntimeError) as raised:
        set_up(Net(no_buffer, torch.float64), "bf16-true")(torch.ones(4, 4))
    assert type(raised.value) is RuntimeError


def test_integers_formats_and_statistics_are_not_named() -> None:
    class Codes(nn.Module, FixedDtype):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("offset", torch.ones(1))

    model = Net(F.linear)
    model.codes, model.norm = Codes(), nn.BatchNorm1d(4, affine=False)
    model.register_buffer("count", torch.zeros(1, dtype=torch.long))
    model.register_buffer("phases", torch.zeros(1, dtype=torch.complex64))
    # Not a dtype of the message.
    model.register_buffer("times", torch.zeros(1, dtype=torch.float64))
    with pytest.raises(DtypeMismatchError, match=r"have another dtype: positions\.table \(torch\.float32\)\. If"):
        set_up(model, "bf16-true")(torch.ones(4, 4))


def test_a_long_list_is_cut() -> None:
    model = Net(F.linear)
    for number in range(12):
        model.register_buffer(f"table_{number}", torch.ones(1))
    with pytest.raises(DtypeMismatchError, match=r"table_9 \(torch\.float32\), \.\.\. \(13 in all\)"):
        set_up(model, "bf16-true")(torch.ones(4, 4))


def test_an_error_that_is_explained_is_not_explained_again() -> None:
    model = Net(F.linear)
    error = DtypeMismatchError("Float and BFloat16 must have the same dtype")
    assert explain_mismatch(error, model, "bf16-true", (torch.bfloat16,)) is None


@pytest.mark.parametrize(
    "message",
    [
        "Input type (CPUBFloat16Type) and weight type (torch.FloatTensor) should be the same",
        "Input type (c10::BFloat16) and bias type (float) should be the same",
        "expected mat1 and mat2 to have the same dtype, but got: float != c10::BFloat16",
        "Expected tensor for argument #1 'weight' to have the same type as tensor for argument #2; but type "
        "torch.cuda.BFloat16Tensor does not equal torch.cuda.FloatTensor",
        "Dynamo failed to run FX node: got RuntimeError('m1 and m2: float != c10::BFloat16')",
    ],
)
def test_messages_of_other_devices_and_of_compilers_are_understood(message: str) -> None:
    explained = explain_mismatch(RuntimeError(message), Net(F.linear), "bf16-true", (torch.bfloat16,))
    assert message in str(explained)


@pytest.mark.parametrize(
    "message",
    [
        "\"addmm_impl_cpu_\" not implemented for 'Half'",
        "expected scalar type Long but found Float",
        "Expected tensor for argument #1 'indices' to have one of the following scalar types: Long, Int; but got "
        "torch.FloatTensor instead",
        "Expected floating point type for result tensor, but got Long",
        "scale of Float8_e4m3fn must be Float",
        "mat1 and mat2 shapes cannot be multiplied (4x4 and 3x3)",
        "",
    ],
)
def test_messages_about_something_else_are_not(message: str) -> None:
    assert explain_mismatch(RuntimeError(message), Net(F.linear), "bf16-true", (torch.bfloat16,)) is None
