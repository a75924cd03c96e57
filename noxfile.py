"""Every check of the project, one session each. `python -m nox` runs all but `bench`, `zoo` and `gpu`.

`python -m nox -s tests -- -k deferred` passes what follows `--` to the session's tool.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2025.2.9"
# pip resolves torch from wherever pip is configured to look; other installers may not.
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")
# One thread per process: ranks share the cores, and single-process results do not depend on their number.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def install(session: nox.Session, *arguments: str, group: str | None = None) -> None:
    """Install `arguments` and a dependency group of pyproject.toml, within the constraints."""
    requirements = nox.project.dependency_groups(PROJECT, group) if group else ()
    session.install("-c", "constraints.txt", *arguments, *requirements)


def pytest(session: nox.Session, *arguments: str) -> None:
    session.run("python", "-m", "pytest", *arguments, *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session: nox.Session) -> None:
    """Run ruff: rules and format."""
    install(session, group="lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def layers(session: nox.Session) -> None:
    """Hold the layers with import-linter."""
    install(session, group="layers")
    session.run("lint-imports", env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy --strict."""
    install(session, "-e", ".[examples]", group="types")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests that need one process, and the doctests."""
    install(session, "-e", ".[examples]", group="test")
    elsewhere = [f"--ignore=tests/{folder}" for folder in ("multi", "examples", "bench", "gpu")]
    # Each worker is a process with its own memory, and a file's tests stay together.
    workers = ("-n", "auto", "--dist", "loadfile")
    pytest(session, *workers, "--doctest-modules", "src/nucleate", "tests", *elsewhere)


@nox.session
def multi(session: nox.Session) -> None:
    """Run the tests on 2 and 4 gloo ranks, each group started by torchrun."""
    install(session, "-e", ".[examples]", group="test")
    pytest(session, "tests/multi")


@nox.session
def examples(session: nox.Session) -> None:
    """Run every example."""
    install(session, "-e", ".[examples]", group="test")
    pytest(session, "tests/examples")


@nox.session
def plugins(session: nox.Session) -> None:
    """Install nucleate and the example plugin as wheels, run the plugin's tests, then the core's beside it."""
    install(session, ".", "./examples/plugin", group="test")
    session.chdir("examples/plugin")
    pytest(session)
    # The same suite on two ranks: -x, or a rank that fails one test leaves the other waiting in it.
    torchrun = ("python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    session.run(*torchrun, "-m", "pytest", "-x", "-q", "tests/test_compressed.py", env=ONE_THREAD)
    session.chdir("../..")
    pytest(session, "tests/test_registry.py", "tests/test_exported_members.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the code blocks of the README and the docs, then build the site; a warning is an error."""
    install(session, "-e", ".[examples]", group="docs")
    pytest(session, "README.md", "CONTRIBUTING.md", "docs")
    # Not --quiet, which also hides warnings from --strict. The variable silences the theme's own announcements.
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp(), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Check the benchmarks, then measure costs beside eager torch, raw fully_shard and Lightning Fabric.

    `python -m nox -s bench -- --write` writes docs/benchmarks.md.
    """
    install(session, "-e", ".[examples]", group="bench")
    session.run("python", "-m", "pytest", "tests/bench", env=ONE_THREAD)
    session.run("python", "-m", "tests.bench", *session.posargs)


@nox.session(default=False)
def zoo(session: nox.Session) -> None:
    """Make every architecture of torch.nn, transformers, timm and diffusers eagerly and deferred, and compare.

    `python -m nox -s zoo -- transformers -k Llama --jobs 4` judges a part of them.
    """
    install(session, "-e", ".", group="zoo")
    session.run("python", "-m", "tests.architectures", *session.posargs, env=ONE_THREAD)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device."""
    install(session, "-e", ".[examples]", group="test")
    pytest(session, "-m", "cuda", "tests")
