"""Names and numbers of any length in damaged files end in a short error that names the file."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from torch import nn

from nucleate.checkpoint import load, load_raw
from nucleate.cluster import Communicator
from nucleate.errors import CheckpointError, CheckpointNotFoundError

LONG = "k" * 1_000_000
ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "a key in the way": f'{{"{LONG}":{ENTRY}}}',
    "a key with a gap": f'{{"{LONG}":{{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}}}',
    "a dtype": f'{{"a":{{"dtype":"{LONG}","shape":[1],"data_offsets":[0,4]}}}}',
    "digits of a shape": f'{{"a":{{"dtype":"F32","shape":[{"1" * 10_000}],"data_offsets":[0,4]}}}}',
    "digits of an offset": f'{{"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,{"1" * 10_000}]}}}}',
}
INDEXES = {
    "a file name": json.dumps({"weight_map": {"a": LONG}}),
    "a key without a file": json.dumps({"weight_map": {LONG: 3}}),
    "a key of a missing file": json.dumps({"weight_map": {LONG: "x.safetensors"}}),
    "digits": f'{{"weight_map": {{"a": {"1" * 10_000}}}}}',
    "a zero byte": json.dumps({"weight_map": {"a": "x\0.safetensors"}}),
}


def check(place: Path, solo: Communicator) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_raw(place, nn.Linear(2, 2), solo)
    assert len(str(caught.value)) <= 1000
    assert str(place) in str(caught.value)


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_in_the_header_of_a_safetensors_file(tmp_path: Path, solo: Communicator, header: str) -> None:
    data = header.encode() + b" " * (-len(header) % 8)
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(4))
    check(tmp_path / "a.safetensors", solo)


@pytest.mark.parametrize("index", INDEXES.values(), ids=INDEXES)
def test_in_an_index(tmp_path: Path, solo: Communicator, index: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    check(tmp_path, solo)


@pytest.mark.parametrize("name", ["a\0b.pt", LONG, "loop", "loop.pt"], ids=["zero", "long", "link", "link.pt"])
def test_in_a_path(tmp_path: Path, solo: Communicator, name: str) -> None:
    if name.startswith("loop"):
        os.symlink(name, tmp_path / name)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint at") as caught:
        load(f"{tmp_path}/{name}", None, solo)
    assert len(str(caught.value)) <= 1000
