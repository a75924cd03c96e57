"""Unedited scripts of Fabric on nucleate: the stand-in, its command, and the places where `Fabric` is not `Runtime`."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from nucleate.compat.fabric import Fabric, install, uninstall
from nucleate.compat.names import MODULES
from nucleate.errors import UsageError

SCRIPT = """
import lightning as L
import torch
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy
from lightning.fabric.utilities import AttributeDict, rank_zero_only
from lightning.fabric.utilities.throughput import measure_flops

seed_everything(3)
fabric = L.Fabric(accelerator="cpu", devices=1)
fabric.launch()
with fabric.init_module(empty_init=True):
    model = torch.nn.Linear(4, 2)
model.load_state_dict({"weight": torch.ones(2, 4), "bias": torch.zeros(2)})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = fabric.setup(model, optimizer)
loss = model(torch.ones(3, 4)).sum()
fabric.backward(loss)
optimizer.step()
fabric.print(type(fabric).__mro__[1].__module__, loss.item(), fabric.world_size)
assert not isinstance(fabric.strategy, (DDPStrategy, FSDPStrategy))
"""


@pytest.fixture
def stand_in():
    install(force=True)
    yield
    uninstall()


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=200, **options)  # type: ignore[call-overload]


def test_importing_the_module_does_nothing() -> None:
    code = """
import sys
before = list(sys.meta_path)
import nucleate.compat.fabric
print(sys.meta_path == before, 'torch' in sys.modules)
"""
    assert run("-c", code).stdout.split() == ["True", "False"]


def test_a_script_of_fabric_runs_unedited(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run("-m", "nucleate.compat.fabric", "script.py", cwd=tmp_path)
    assert done.stdout.split() == ["nucleate.runtime.runtime", "24.0", "1"], done.stderr


def test_a_module_of_fabric_runs_unedited(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job/__init__.py").touch()
    (tmp_path / "job/__main__.py").write_text("import sys, lightning\nprint(lightning.Fabric.__module__, sys.argv[1:])")
    done = run("-m", "nucleate.compat.fabric", "-m", "job", "--steps", "3", cwd=tmp_path)
    assert done.stdout.strip() == "nucleate.compat.runtime ['--steps', '3']", done.stderr


def test_a_missing_script_is_named() -> None:
    done = run("-m", "nucleate.compat.fabric", "absent.py")
    assert done.returncode == 2
    assert "there is no file 'absent.py'" in done.stderr


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in MODULES[module]])
def test_every_name_leads_to_an_object(module: str, name: str, stand_in: None) -> None:
    assert getattr(import_module(module), name) is not None


def test_the_modules_and_names_are_fabrics_own() -> None:
    pytest.importorskip("lightning_fabric")
    code = f"""
import importlib
for module, names in {MODULES!r}.items():
    if module.startswith("lightning_fabric"):
        real = importlib.import_module(module)
        print(*(f"{{module}}.{{name}}" for name in names if not hasattr(real, name)))
"""
    done = run("-W", "ignore", "-c", code)
    # Lightning's own examples take these from there.
    newer = {f"lightning_fabric.utilities.types.{name}" for name in ("LRScheduler", "ReduceLROnPlateau")}
    assert set(done.stdout.split()) <= newer, done.stdout
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_carried_is_named(stand_in: None) -> None:
    with pytest.raises(ImportError, match=r"DeepSpeedStrategy.*names.py"):
        from lightning.fabric.strategies import DeepSpeedStrategy  # noqa: F401
    with pytest.raises(AttributeError, match=r"'lightning' does not carry 'Trainer'. The Trainer is the real"):
        import_module("lightning").Trainer  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"lightning\.pytorch\.callbacks"):
        import_module("lightning.pytorch.callbacks")


def test_an_installed_lightning_is_replaced_only_by_force() -> None:
    pytest.importorskip("lightning_fabric")
    with pytest.raises(UsageError, match=r"force=True"):
        install()
    assert not any("Stand" in type(finder).__name__ for finder in sys.meta_path)


def test_the_real_modules_come_back() -> None:
    pytest.importorskip("lightning_fabric")
    code = """
import lightning_fabric
from nucleate.compat.fabric import install, uninstall
install(force=True)
import lightning_fabric as other
assert other.Fabric.__module__ == "nucleate.compat.runtime"
uninstall()
import lightning_fabric as again
assert again.Fabric.__module__ == "lightning_fabric.fabric", again.Fabric
uninstall()
"""
    done = run("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr


def test_no_precision_casts_to_float32_as_fabric_does() -> None:
    fabric = Fabric(accelerator="cpu")
    assert fabric.setup(nn.Linear(2, 2, dtype=torch.float64)).weight.dtype == torch.float32
    assert fabric.strategy.precision is fabric.precision


def test_a_model_of_an_empty_init_can_be_edited_before_setup() -> None:
    fabric = Fabric(accelerator="cpu")
    with fabric.init_module(empty_init=True):
        model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    assert fabric.setup(model).weight.sum() == 4


def test_a_load_returns_the_remainder(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu")
    model = fabric.setup(nn.Linear(2, 2))
    fabric.save(tmp_path / "state.ckpt", {"model": model, "step": 3})
    assert fabric.load(tmp_path / "state.ckpt", {"model": model})["step"] == 3


def test_one_process_gathers_a_tensor_as_it_is() -> None:
    assert Fabric(accelerator="cpu").all_gather(torch.ones(3)).shape == (3,)
