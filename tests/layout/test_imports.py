"""The geometry of parts is plain: whoever asks for it does not load torch's distributed tensors."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import torch
before = set(sys.modules)
import nucleate.layout
import nucleate.layout.holders
import nucleate.layout.placements
new = set(sys.modules) - before
print(*sorted(name for name in sys.modules if name.startswith(("torch.distributed.tensor", "torch.distributed.fsdp"))))
print(*sorted(name for name in new if name.startswith("nucleate.")))
"""


def test_geometry_loads_errors_shells_and_itself_and_no_distributed_tensors() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    distributed, ours = done.stdout.split("\n")[:2]
    assert distributed == ""
    assert {name for name in ours.split() if not name.startswith("nucleate.layout")} <= {
        "nucleate.errors",
        "nucleate.shells",
    }
    assert "nucleate.layout.agreement" not in ours.split()
