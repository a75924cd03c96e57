"""A notebook in a real kernel of Jupyter trains on two ranks, which are forks of the kernel."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytest.importorskip("nbclient", reason="nbclient is not installed")

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

CELLS = {
    "definitions": """
import os
import torch
from torch import nn
from nucleate import Runtime

def main(runtime, steps, fault=None):
    torch.manual_seed(0)
    with runtime.init_module():
        model = nn.Linear(40, 1)
    model, optimizer = runtime.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(steps):
        inputs = torch.full((2, 40), float(runtime.global_rank))
        runtime.backward(model(inputs).sum())
        optimizer.step()
        optimizer.zero_grad()
        if fault == "error" and runtime.global_rank == 1:
            raise ValueError("out of cheese")
        if fault == "killed" and runtime.global_rank == 1:
            os.kill(os.getpid(), 9)
    print(f"rank {runtime.global_rank} of {runtime.world_size}\\n", end="")
    return model.weight.full_tensor() if hasattr(model.weight, "full_tensor") else model.weight.detach()

runtime = Runtime(accelerator="cpu", devices=2)
# OpenMP has threads from now on, which forks do not have.
before = torch.randn(500, 500) @ torch.randn(500, 500)
""",
    "ddp": "weight = runtime.launch(main, 3)\ntuple(weight.shape)",
    "fsdp": """
sharded = Runtime(accelerator="cpu", devices=2, strategy="fsdp").launch(main, steps=3)
torch.equal(sharded, weight)
""",
    "error": "runtime.launch(main, 3, fault='error')",
    "killed": "runtime.launch(main, 3, fault='killed')",
    "the script again": "Runtime(accelerator='cpu', devices=2).barrier()",
    "spawn": "Runtime(accelerator='cpu', devices=2, strategy='ddp_spawn').launch(main, 3)",
    "afterwards": """
import multiprocessing
torch.equal(runtime.launch(main, 3), weight) and not multiprocessing.active_children()
""",
}


class ThisPython(KernelSpecManager):
    """The one kernel is the interpreter of the tests."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


class Manager(AsyncKernelManager):
    def __init__(self, **options: Any) -> None:
        super().__init__(kernel_spec_manager=ThisPython(), **options)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each cell gives, by the cell's name."""
    folder: Path = tmp_path_factory.mktemp("jupyter")
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS.values()])
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name not in place}
    variables |= {"IPYTHONDIR": str(folder), "JUPYTER_RUNTIME_DIR": str(folder)}
    # The client ends a kernel that it has made.
    NotebookClient(notebook, kernel_manager_class=Manager, timeout=200, allow_errors=True).execute(env=variables)
    return dict(zip(CELLS, (cell.outputs for cell in notebook.cells), strict=True))


def results(shown: list[Any]) -> list[str]:
    return [one.data["text/plain"] for one in shown if one.output_type == "execute_result"]


def printed(shown: list[Any]) -> str:
    return "".join(one.text for one in shown if one.output_type == "stream" and one.name == "stdout")


def errors(shown: list[Any]) -> list[tuple[str, str]]:
    return [(one.ename, one.evalue) for one in shown if one.output_type == "error"]


@pytest.mark.parametrize(("name", "result"), [("ddp", "(1, 40)"), ("fsdp", "True"), ("afterwards", "True")])
def test_a_function_runs_in_ranks_and_its_result_comes_back(
    outputs: dict[str, list[Any]], name: str, result: str
) -> None:
    assert errors(outputs["definitions"]) == []
    assert results(outputs[name]) == [result], outputs[name]
    # The kernel's stream cuts a line at its end, so two ranks mix lines.
    assert {"rank 0 of 2", "rank 1 of 2"} == set(printed(outputs[name]).split("\n")) - {""}


def test_an_error_of_a_rank_is_the_error_of_the_cell(outputs: dict[str, list[Any]]) -> None:
    ((kind, message),) = errors(outputs["error"])
    assert kind == "RankFailedError"
    assert message.startswith("rank 1 of 2 failed first:")
    assert message.endswith("ValueError: out of cheese")
    ((kind, message),) = errors(outputs["killed"])
    assert kind == "RankExitError"
    assert "rank 1 of 2 was killed first, by SIGKILL" in message


def test_ways_that_need_a_script_are_refused(outputs: dict[str, list[Any]]) -> None:
    ((kind, message),) = errors(outputs["the script again"])
    assert kind == "UsageError"
    assert "runtime.launch(main)" in message
    ((kind, message),) = errors(outputs["spawn"])
    assert kind == "UsageError"
    assert "they cannot find `main`" in message
