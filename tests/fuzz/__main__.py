"""Feeds a target with bytes that atheris finds by watching which lines run: `pip install atheris` first."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed. Install it with `pip install atheris`.")

with atheris.instrument_imports(include=["nucleate.checkpoint"]):
    # By name: they are imported when a path is claimed, and would not be watched then.
    from nucleate.checkpoint.readers import safetensors  # noqa: F401
    from nucleate.checkpoint.readers.dcp import dcp  # noqa: F401
    from nucleate.checkpoint.readers.torch import torch_file  # noqa: F401
    from tests.fuzz.targets import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="a folder that keeps what was found for the next time")
    arguments = parser.parse_args()
    target = TARGETS[arguments.target]
    corpus = arguments.corpus or Path(tempfile.mkdtemp())
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [
        str(corpus),
        f"-max_total_time={arguments.seconds}",
        "-timeout=2",
        "-rss_limit_mb=2048",
        "-malloc_limit_mb=512",
        "-max_len=16384",
        f"-artifact_prefix={corpus}-",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
