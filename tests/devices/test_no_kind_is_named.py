"""No generic path names a kind of device: what depends on one is asked of its hooks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import nucleate

SOURCE = Path(nucleate.__file__).parent

#: The files of CUDA's own.
OWN = {"accelerators/cuda.py", "devices/cuda.py", "devices/philox.py"}
#: Where else a kind is named, how often, and why. A name that is gone must leave this list as well.
ALLOWED = {
    ("accelerators/__init__.py", "cuda"): "exports the class",
    ("accelerators/__init__.py", "CUDAAccelerator"): "exports the class",
    ("compat/names.py", "CUDAAccelerator"): "a name that scripts of Fabric import",
    ("deferred/recording/op_schema.py", "cudnn_batch_norm"): "torch's name of an operation",
    ("devices/table.py", "cuda"): "the kind that has hooks of its own",
    ("devices/table.py", "CUDAHooks"): "the kind that has hooks of its own",
    ("registry.py", "cuda"): "a name that users write; torch's own",
    ("registry.py", "CUDAAccelerator"): "a name that users write; torch's own",
    ("registry.py", "mps"): "a name that users write; torch's own",
    ("registry.py", "xpu"): "a name that users write; torch's own",
}
_KIND = re.compile(r"cuda|nccl|xpu|xccl|(?<![a-z])mps(?![a-z])|cudnn|hip(?![a-z])", re.IGNORECASE)


def named(path: Path) -> Iterator[str]:
    """Yield the words of a file's code and strings that name a kind; comments and docstrings may, for an example."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if id(node) not in docstrings:
            # Names of any kind, and the value of a string.
            texts = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
            yield from (word for text in texts for word in re.findall(r"\w+", text) if _KIND.search(word))


def test_a_kind_of_device_is_named_in_its_own_files_only() -> None:
    found = {
        (path.relative_to(SOURCE).as_posix(), word)
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).as_posix() not in OWN
        for word in named(path)
    }
    assert found - ALLOWED.keys() == set(), "ask `nucleate.devices.hooks_of(device)` instead"
    assert ALLOWED.keys() - found == set(), "this is not named any more: take it off the list"


def test_the_search_finds_names_in_code_and_strings_and_not_in_docstrings(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    path.write_text(
        '"""Of cuda."""\nimport torch.cuda\nx = f"a {torch.xpu} nccl"\n'
        "def is_cuda(device='mps'):\n    'Of xpu.'\n    return pickle.dumps(device, cuda=1)  # nccl\n"
    )
    assert sorted(named(path)) == ["cuda", "cuda", "is_cuda", "mps", "nccl", "xpu"]
