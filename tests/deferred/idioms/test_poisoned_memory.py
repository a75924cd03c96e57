"""Nothing in a materialized model is what memory held before: here that is filled with a pattern."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_BUILD = """
import hashlib, importlib, sys, warnings
warnings.simplefilter("ignore")
import torch
from nucleate.deferred import deferred
from nucleate.materialize import materialize
from tests.deferred.equality import bits, named_tensors
from tests.deferred.idioms.idiom import Constructed

taken = torch.empty(64).view(torch.uint8)
assert (taken == 255 - int(sys.argv[1])).all(), "memory is not poisoned"
for family in sys.argv[2:]:
    for name, body in importlib.import_module(f"tests.deferred.idioms.{family}").idiom.items():
        torch.manual_seed(0)
        with deferred():
            model = Constructed(body)
        materialize(model)
        digest = hashlib.blake2b(digest_size=8)
        for fqn, tensor in sorted(named_tensors(model).items()):
            if tensor.layout == torch.strided:
                digest.update(fqn.encode() + bits(tensor))
        print(family, name, digest.hexdigest())
"""

_FAMILIES = ["test_control_flow", "test_storage", "test_randomness", "test_modules", "test_numerics"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc's MALLOC_PERTURB_")
def test_models_do_not_depend_on_what_memory_held() -> None:
    # glibc fills memory with the pattern's complement when it is taken, and with the pattern when it is freed.
    first, second = (
        subprocess.run(
            [sys.executable, "-c", _BUILD, pattern, *_FAMILIES],
            env={**os.environ, "MALLOC_PERTURB_": pattern, "PYTHONPATH": os.pathsep.join(["src", "."])},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        for pattern in ("1", "128")
    )
    assert len(first) > 50
    assert first == second
