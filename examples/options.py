"""Command-line options that examples 04 to 09 have in common."""

from __future__ import annotations

import argparse


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that say where and how an example runs.

    Args:
        description: The docstring of the example; its first line describes it.
    """
    parser = argparse.ArgumentParser(
        description=(description or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--accelerator", default="auto", help="cpu or cuda; auto takes cuda where there is one")
    parser.add_argument("--strategy", default="auto", help="single_device, ddp or fsdp")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, ...")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the order of the data")
    return parser
