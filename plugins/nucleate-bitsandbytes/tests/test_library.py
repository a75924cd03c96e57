from __future__ import annotations

import logging
import subprocess
import sys

from nucleate_bitsandbytes.library import bitsandbytes


def test_importing_the_package_and_its_quantizers_does_not_import_bitsandbytes() -> None:
    code = "import sys, nucleate_bitsandbytes.quantizers; assert 'bitsandbytes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_bitsandbytes_is_imported_without_a_word_about_kernels() -> None:
    code = "from nucleate_bitsandbytes.library import bitsandbytes; assert bitsandbytes().__name__ == 'bitsandbytes'"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert "kernels" not in done.stderr


def test_the_logger_is_left_as_it_was() -> None:
    bitsandbytes()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").filters


def test_a_library_that_is_not_there_is_named() -> None:
    script = """
import sys
sys.modules["bitsandbytes"] = None
from nucleate.errors import MissingDependencyError
from nucleate_bitsandbytes.library import bitsandbytes
try:
    bitsandbytes()
except MissingDependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert "pip install bitsandbytes" in done.stdout
