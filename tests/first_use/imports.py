"""Asks a process of its own what first uses import, and compares."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

#: Parts of torch that `import torch` (2.13) leaves out. They take seconds.
LATE = (
    "sympy", "torch._dynamo", "torch._functorch.aot_autograd", "torch._inductor", "torch.distributed.checkpoint",
    "torch.distributed.fsdp", "torch.distributed.tensor", "torch.fx.experimental.symbolic_shapes", "torch.onnx",
)  # fmt: skip
#: Parts of torch that its own modes and default device import, in less than a millisecond.
SMALL = {"torch._subclasses.schema_check_mode", "torch.utils._device"}


@functools.cache
def imports(group: str) -> dict[str, dict[str, list[str]]]:
    """Return for each use of a group what it imports with and without nucleate; see `tests.first_use.__main__`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # As torchrun sets them for its processes.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.first_use", group], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    return found


def assert_same_imports(group: str) -> dict[str, dict[str, list[str]]]:
    """Assert that a group of uses imports nothing but nucleate that it does not import without; return the imports."""
    found = imports(group)
    assert len(found) >= 3
    for name, both in found.items():
        assert any(module.startswith("nucleate") for module in both["ours"]), name
        others = {module for module in both["ours"] if not module.startswith("nucleate")}
        assert others - set(both["plain"]) <= SMALL, name
    return found
