"""The compiled part of the simulated device: built at first use, then loaded from torch's folder of extensions.

The folder's name holds the versions of torch and Python and a hash of the sources, so a copy that is there fits.
`python -m tests.sim.build` builds it ahead of the tests.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import _appdirs

SOURCES = Path(__file__).with_name("csrc")
NAME = "nucleate_sim_device"
# The kernels are torch's own; what is compiled here is glue, and compiles in a third less time than with -O2.
FLAGS = ("-O1", "-g0")
_MESSAGE_LIMIT = 4000
# torch does not build twice in a process, so the first failure is the one that tells.
_failures: list[NoCompiler] = []


class NoCompiler(RuntimeError):  # noqa: N818
    """The extension is not built yet and cannot be built here."""


def load() -> ModuleType:
    """Return the extension, built if need be; processes that ask at the same time build it once.

    Raises:
        NoCompiler: No compiler or no ninja, or the compiler failed; the message is theirs.
    """
    if NAME in sys.modules:
        return sys.modules[NAME]
    folder = _root() / f"{NAME}_{_fingerprint()}"
    library, finished = folder / f"{NAME}.so", folder / "finished"
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "building"):
            if not finished.exists():
                if _failures:
                    raise _failures[0]
                _build(folder)
                finished.touch()
    return _imported(library)


def _root() -> Path:
    """Return torch's folder of extensions, as `torch.utils.cpp_extension` finds it, which takes long to import."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return Path(root) if root else Path(_appdirs.user_cache_dir(appname="torch_extensions")).resolve()


def _fingerprint() -> str:
    digest = hashlib.sha256(repr((torch.__version__, sys.version, FLAGS)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    return f"torch{torch.__version__}_{python}_{digest.hexdigest()[:16]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # A lock of the system, which ends with the process that holds it; torch's own is a file that stays.
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path) -> None:
    # What a killed build left: torch would wait for ever.
    (folder / "lock").unlink(missing_ok=True)
    sources = [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
    # ninja is a script of this environment, which need not be activated.
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    with warnings.catch_warnings(), _environment(PATH=path, MAX_JOBS=os.environ.get("MAX_JOBS", str(os.cpu_count()))):
        warnings.simplefilter("ignore")  # torch warns where it cannot find the compiler's version
        from torch.utils import cpp_extension

        try:
            # Not a Python module to torch: it is imported from the finished folder only.
            cpp_extension.load(
                NAME, sources, extra_cflags=list(FLAGS), build_directory=str(folder), is_python_module=False
            )
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            _failures.append(
                NoCompiler(
                    f"The simulated device cannot be built: {str(error)[-_MESSAGE_LIMIT:]}\n"
                    "Install a C++ compiler (g++) and ninja (pip install ninja)."
                )
            )
            raise _failures[0] from error


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _imported(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[NAME] = module
    return module


if __name__ == "__main__":
    print(load().__file__)
