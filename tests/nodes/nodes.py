"""Nodes of a cluster on one machine: each has namespaces of its own, and a cable joins the two.

A node has its own network, host name, mounts and process ids. It sees the files of this machine, except for what was
mounted for it alone. Nothing has a name outside, so several tests run at once and nothing stays.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.multi.ranks import ROOT

_DEVICE = "cable"
_PORT = 29400
#: The first process of a node. Everything in the node ends with it.
_FIRST = """
mount --bind "$1" /etc/hosts && hostname "$2" && ip link set lo up && shift 2 &&
for folder do mount -t tmpfs tmpfs "$folder" || exit 1; done && echo ready && exec sleep 1000
"""
_NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


class NoNamespaces(Exception):  # noqa: N818 - it is a reason to skip
    """This process may not make nodes, as in most containers."""


@dataclass
class Node:
    """One node.

    Attributes:
        name: Its host name.
        address: Its address on the cable.
        first: Its first process, as this machine numbers it.
        network: A descriptor of its network, which therefore outlives its processes.
        started: The commands that run on it.
    """

    name: str
    address: str
    first: int
    network: int
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *command: str, **variables: str) -> subprocess.Popen[str]:
        """Start a command on this node."""
        kept = {name: value for name, value in os.environ.items() if name not in _PLACE}
        process = subprocess.Popen(
            ["nsenter", "--target", str(self.first), "--net", "--uts", "--mount", "--pid", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")]), **variables},
        )
        self.started.append(process)
        return process

    def kill(self) -> None:
        """Kill all processes of this node by SIGKILL. Its end of the cable stays."""
        os.kill(self.first, signal.SIGKILL)

    def pull_cable(self) -> None:
        """Take down the link, so that nothing arrives any more and nobody is told."""
        _run("nsenter", f"--net=/proc/self/fd/{self.network}", "ip", "link", "set", _DEVICE, "down", fd=self.network)


_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def nodes_or_skip(*own_folders: Path) -> Iterator[tuple[Node, Node]]:
    """Make two nodes as `two_nodes` does, and skip the test where that is refused."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(two_nodes(*own_folders))
        except NoNamespaces as refused:
            pytest.skip(f"needs root and namespaces for two nodes: {refused}")
        yield made


@contextmanager
def two_nodes(*own_folders: Path) -> Iterator[tuple[Node, Node]]:
    """Make two nodes that reach each other, and end everything on them at the end.

    Args:
        own_folders: Folders that are another, empty one on each node.

    Raises:
        NoNamespaces: This process may not do so.
    """
    missing = [program for program in ("unshare", "nsenter", "ip", "mount") if shutil.which(program) is None]
    if sys.platform != "linux" or missing:
        raise NoNamespaces(f"no {', '.join(missing) or 'namespaces'} here")
    names = {"node0.test": "10.77.0.1", "node1.test": "10.77.0.2"}
    with ExitStack() as stack:
        hosts = Path(stack.enter_context(TemporaryDirectory())) / "hosts"
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))
        first, second = (
            stack.enter_context(_node(name, address, hosts, own_folders)) for name, address in names.items()
        )
        ends = [("netns", str(node.first)) for node in (first, second)]
        _run("ip", "link", "add", _DEVICE, *ends[0], "type", "veth", "peer", "name", _DEVICE, *ends[1])
        for node in (first, second):
            inside = ("nsenter", "--target", str(node.first), "--net", "ip")
            _run(*inside, "address", "add", f"{node.address}/24", "dev", _DEVICE)
            _run(*inside, "link", "set", _DEVICE, "up")
        yield first, second


@contextmanager
def _node(name: str, address: str, hosts: Path, own_folders: tuple[Path, ...]) -> Iterator[Node]:
    command = [*_NAMESPACES, "sh", "-c", _FIRST, "sh", str(hosts), name, *map(str, own_folders)]
    outside = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert outside.stdout is not None
    try:
        if outside.stdout.readline() != "ready\n":
            raise NoNamespaces(outside.communicate()[1].strip())
        first = int(Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text())
        node = Node(name, address, first, os.open(f"/proc/{first}/ns/net", os.O_RDONLY))
        try:
            yield node
        finally:
            os.close(node.network)
            outside.kill()
            for process in node.started:
                process.kill()
                process.communicate()
    finally:
        # The program ignores every other signal, and its end kills the first process of the node.
        outside.kill()
        outside.communicate()


def start_torchrun(nodes: tuple[Node, Node], num_ranks: int, script: Path, *arguments: object) -> None:
    """Start torchrun on both nodes, with a rendezvous on the first one.

    Args:
        nodes: The nodes.
        num_ranks: The number of ranks on each node.
        script: The program of each rank.
        arguments: Its arguments.
    """
    options = ("--nnodes", "2", "--nproc-per-node", str(num_ranks), "--rdzv-backend", "c10d", "--rdzv-id", "test")
    endpoint = ("--rdzv-endpoint", f"{nodes[0].name}:{_PORT}")
    for node in nodes:
        command = (sys.executable, "-m", "torch.distributed.run", *options, *endpoint, str(script))
        node.start(*command, *map(str, arguments), OMP_NUM_THREADS="1")


def _run(*command: str, fd: int | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, pass_fds=[] if fd is None else [fd], check=False, timeout=30
    )
    if done.returncode:
        raise NoNamespaces(f"{' '.join(command)}: {done.stderr.strip()}")
