"""What is public: the `__all__` of each package, written down here a second time so that a change is on purpose."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import nucleate

ROOT = Path(__file__).parents[1]
SOURCE = Path(nucleate.__file__).parent

PUBLIC = {
    "nucleate": "Accelerator Integration Precision RandomState Runtime Strategy __version__ is_wrapped seed_everything",
    "nucleate.accelerators": "Accelerator CPUAccelerator CUDAAccelerator TorchAccelerator",
    "nucleate.checkpoint": """
        ConvertReport Finding KeyMap LoadReport Reader Rule SaveHandle Selection StoredForm StoredSources VerifyReport
        add_prefix concatenate convert drop inverse load load_raw open_checkpoint permute_heads read_rules
        rename save split stack strip_prefix transpose unstack verify
    """,
    "nucleate.checkpoint.disk": "resolve",
    "nucleate.checkpoint.loading": "Finding LoadReport StoredForm StoredSources bound defers",
    "nucleate.checkpoint.readers": "Reader VALUES agree_on_save contents_of open_checkpoint open_saved reader_for",
    "nucleate.checkpoint.readers.dcp": "",
    "nucleate.checkpoint.readers.torch": "ZipDirectory prefix_of",
    "nucleate.checkpoint.rules": "",
    "nucleate.checkpoint.saving": "SaveHandle Snapshot",
    "nucleate.checkpoint.state": "KeyPath key_of",
    "nucleate.checkpoint.stored": "Bytes Chunk Contents DataFile HeldBytes StoredTensor first_bytes",
    "nucleate.checkpoint.tools": "",
    "nucleate.checkpoint.writers": "Place Writer create_file write_tensors",
    "nucleate.cli": "main",
    "nucleate.cluster": "Communicator Environment",
    "nucleate.cluster.watch": "CALLS begin end is_on",
    "nucleate.compat": "",
    "nucleate.compat.pieces": "",
    "nucleate.deferred": """
        ComputedSource Conversion ConvertedSource ElementSource Handle Layout Output RangeMaker Record StreamCursors
        TensorSource bind bind_all convert deferred eager handle_of held_tensors is_recording ordinary
        outside_inference_mode plain_modes record_of release resumed
    """,
    "nucleate.deferred.elements": """
        Conversion ConvertedSource ElementSource Layout Output TensorSource fill_from fill_range_from
    """,
    "nucleate.deferred.guards": "Handle guard handle_of is_edit is_edited refuse_stale release retie",
    "nucleate.deferred.impersonation": "",
    "nucleate.deferred.randomness": "StreamCursors RandomProgram Workspace draw is_contiguous moved",
    "nucleate.deferred.recording": "",
    "nucleate.deferred.replay": """
        Derived RangeMaker Replayer TensorView backward_slice boxes derived_source maker_of scatter view
    """,
    "nucleate.deferred.tape": "Constant Position Run Step Tape TensorRef is_written map_leaves tensors",
    "nucleate.devices": """
        DeviceHooks Staging casts_there concrete default_generator devices_taken hooks_of is_present
        made_current move slabs take_device use_hooks
    """,
    "nucleate.integrations": "Integration declare_shell",
    "nucleate.dimensions": """
        ActivationCheckpointing Compile Dimension FullyShard ModelPlan Placements Replicate TensorParallel declare_plan
        share_random_stream
    """,
    "nucleate.dimensions.sharding": "",
    "nucleate.layout": """
        AXES DATA_AXES Box Dealer Layout LiveLayout Mesh Partial Placement Replicate Shard TensorLayout axes_of
        boxes_of cut flat_start gathered_from held_values is_partial is_sharded is_writer laid_out_like layout_of
        local_of merged offsets_of reduced_gradient runs spread_of whole_of zeros_beside
    """,
    "nucleate.loggers": "CSVLogger Logger MLFlowLogger TensorBoardLogger WandbLogger",
    "nucleate.materialize": "Plan execute materialize reset",
    "nucleate.precision": """
        FixedDtype FullPrecision HalfPrecision MixedPrecision NoCastPrecision Precision layers_to_freeze
    """,
    "nucleate.report": """
        Progress Throughput ThroughputMonitor anonymous_bytes format_bytes measure_flops peak_rss_bytes progress
        save_loss_curve
    """,
    "nucleate.runtime": "Runtime",
    "nucleate.strategies": """
        DDPStrategy FSDPStrategy ModelParallelStrategy Parallel SingleDeviceStrategy Strategy declare_units
    """,
    "nucleate.testing": """
        AcceleratorSuite DimensionSuite IntegrationSuite MODELS PeakMemory PrecisionSuite ReaderSuite StrategySuite
        TinyConvNet TinyGPT TinyModel TinyOdd TinyRecurrent TinyTransformer WriterSuite assert_peak_memory_below
        peak_memory
    """,
    "nucleate.wrappers": "DataLoaderWrapper ModuleWrapper OptimizerWrapper is_wrapped",
}


def packages() -> list[str]:
    found = pkgutil.walk_packages([str(SOURCE)], prefix="nucleate.")
    return ["nucleate", *(module.name for module in found if module.ispkg)]


def test_every_package_is_listed() -> None:
    assert set(packages()) == set(PUBLIC)


@pytest.mark.parametrize("package", packages())
def test_a_package_exports_what_is_listed_here(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    assert set(module.__all__) <= set(dir(module))


@pytest.mark.parametrize("package", packages())
def test_every_exported_name_is_the_object_and_not_a_module_of_the_same_name(package: str) -> None:
    # `nucleate.x` is a function until `import nucleate.x.y` puts the subpackage in its place, whatever is asked first.
    for module in pkgutil.walk_packages([str(SOURCE)], prefix="nucleate."):
        importlib.import_module(module.name)
    exporter = importlib.import_module(package)
    for name in exporter.__all__:
        assert not isinstance(getattr(exporter, name), ModuleType), f"{package}.{name} is a module"


@pytest.mark.parametrize("package", [name for name in packages() if name != "nucleate"])
def test_nothing_public_is_imported_without_being_exported(package: str) -> None:
    module = importlib.import_module(package)
    imported = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and str(getattr(value, "__module__", "")).startswith("nucleate")
    }
    assert imported <= {*module.__all__, "MissingDependencyError"}


@pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs the repository, not an installed package")
def test_the_page_of_the_runtime_lists_its_methods() -> None:
    page = (ROOT / "docs" / "reference" / "runtime.md").read_text()
    public = {name for name in dir(nucleate.Runtime) if not name.startswith("_")}
    assert set(re.findall(r"^ {8}- (\w+)$", page, flags=re.MULTILINE)) == public


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Rantime'"):
        nucleate.Rantime  # noqa: B018


def test_importing_everything_needs_no_optional_package_and_changes_nothing() -> None:
    modules = [m.name for m in pkgutil.walk_packages([str(SOURCE)], "nucleate.") if ".testing" not in m.name]
    program = f"""
import importlib, sys, torch
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("matplotlib", "tqdm", "rich", "pytest", "lightning", "transformers",
                                      "tensorboard", "wandb", "mlflow"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
def state():
    init = torch.nn.init
    return (torch.get_rng_state().sum(), torch.get_default_dtype(), torch.get_num_threads(),
            init._no_grad_trunc_normal_, torch.Tensor.backward,
            torch.nn.Module.__call__, torch.nn.Module.register_parameter)
before = state()
for name in {modules!r}:
    importlib.import_module(name)
assert state() == before
assert not torch.distributed.is_initialized()
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_version_is_the_top_of_the_changelog() -> None:
    versions = re.findall(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert nucleate.__version__ == versions[0]


def test_the_ci_runs_the_second_command_of_the_readme() -> None:
    commands = re.findall(r"^python -m pip install .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[-1] == commands[1]


def test_no_extra_is_named_that_does_not_exist() -> None:
    named = {extra for path in SOURCE.rglob("*.py") for extra in re.findall(r"nucleate\[(\w+)\]", path.read_text())}
    project = (ROOT / "pyproject.toml").read_text()
    assert named
    assert named <= set(re.findall(r"^(\w+) = \[", project, flags=re.MULTILINE))
