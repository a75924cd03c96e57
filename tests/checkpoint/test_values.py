"""Which plain values a checkpoint holds, and how it refuses the others."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nucleate.checkpoint.state.values import decode, encode
from nucleate.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("factories_on_device")

Point = namedtuple("Point", "x y")


class Config:
    pass


@pytest.mark.parametrize(
    "value",
    [
        {"epoch": 3, "best": 0.1, "name": "gpt", "done": False, "nothing": None, "raw": b"\x00\xff"},
        [1, (2, [3, {4: "four"}])],
        OrderedDict(a=1),
        {(1, "a"): {"nested": (None,)}},
        torch.bfloat16,
        torch.device("cpu"),
        torch.Size([2, 3]),
        2**80,
        float("inf"),
        {1, 2},
    ],
    ids=str,
)
def test_plain_values_come_back_equal_and_of_the_same_type(value: Any) -> None:
    back = decode(encode(value))
    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (Config(), "Config"),
        (Point(1, 2), "Point"),
        (lambda: None, "function"),
        (Path("x"), "Path"),
        (torch.nn.Linear(1, 1), "Linear"),
        (type("Sub", (dict,), {})(), "Sub"),
    ],
    ids=["instance", "namedtuple", "lambda", "path", "module", "dict subclass"],
)
def test_what_could_not_be_read_back_is_refused_by_its_place(value: Any, kind: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^run\.parts\.1 is a .*{kind}, which a checkpoint cannot hold"):
        encode({"fine": 1, "run": {"parts": [0, value, 2]}})


def test_the_bytes_are_a_tensor_of_bytes() -> None:
    data = encode({"a": 1})
    assert isinstance(data, Tensor)
    assert data.dtype == torch.uint8
    assert data.ndim == 1


def test_damaged_bytes_are_an_error_of_ours() -> None:
    data = encode({"a": 1})
    with pytest.raises(CheckpointError, match="values cannot be read"):
        decode(data[: len(data) // 2].clone())


def test_bytes_that_would_run_code_are_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    with pytest.raises(CheckpointError, match="values cannot be read"):
        decode(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    assert not (tmp_path / "touched").exists()


def test_values_work_where_numpy_is_not_installed() -> None:
    script = """
        import sys
        sys.modules["numpy"] = None
        import warnings
        warnings.simplefilter("ignore")
        from nucleate.checkpoint.state.values import decode, encode
        assert decode(encode({"a": [1, 2.5]})) == {"a": [1, 2.5]}
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
