"""Jobs on two nodes: one that trains and checks, and one that trains until a node dies."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

from tests.nodes.nodes import Node, nodes_or_skip, start_torchrun

SCRIPTS = Path(__file__).parent / "scripts"
_TIMEOUT_S = 150.0


def check_training(folder: Path, num_ranks: int) -> None:
    """Train, save and load by fsdp and by HSDP over two nodes.

    Args:
        folder: A folder for checkpoints.
        num_ranks: The number of ranks on each node.

    Raises:
        AssertionError: A rank found something wrong.
    """
    shared, own = folder / "shared", folder / "own"
    shared.mkdir()
    own.mkdir()
    with nodes_or_skip(own) as nodes:
        start_torchrun(nodes, num_ranks, SCRIPTS / "train.py", shared, own, "fsdp", "hsdp")
        shown = "".join(map(_output, nodes))
    expected = [
        (strategy, str(rank), str(rank // num_ranks)) for strategy in ("fsdp", "hsdp") for rank in range(2 * num_ranks)
    ]
    assert sorted(re.findall(r"(\w+) is right on rank (\d) of node (\d)", shown)) == expected, shown


def start_endless(nodes: tuple[Node, Node]) -> None:
    """Start a training with one rank on each node, and return when both have begun."""
    start_torchrun(nodes, 1, SCRIPTS / "endless.py")
    for node in nodes:
        (job,) = node.started
        assert job.stdout is not None
        assert job.stdout.readline(), job.communicate()[1]


def end_of_other(node: Node) -> float:
    """Wait until the job on a node has failed, and return how many seconds that took.

    Raises:
        AssertionError: The job ended well, or goes on.
    """
    begin = time.monotonic()
    (job,) = node.started
    try:
        job.communicate(timeout=15)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the job on {node.name} goes on") from None
    assert job.returncode != 0
    return time.monotonic() - begin


def _output(node: Node) -> str:
    (job,) = node.started
    stdout, stderr = job.communicate(timeout=_TIMEOUT_S)
    assert job.returncode == 0, f"{node.name} ended with {job.returncode}\n{stdout}\n{stderr[-8000:]}"
    return stdout
