"""Loads Llama's weights into litgpt's GPT on two ranks and saves them as Llama's again; run by test_key_maps.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nucleate import Runtime
from nucleate.checkpoint import open_checkpoint
from nucleate.checkpoint.stored import data_file
from nucleate.cluster import process_group
from tests.examples.test_key_maps import gpt, llama_with, logits, maps

HEADS, GROUPS = 8, 2


def main(folder: Path, target: Path) -> None:
    runtime = Runtime(accelerator="cpu", strategy="fsdp")
    runtime.launch()
    try:
        read = [0]
        real = data_file.DataFile.read_into

        def read_into(self: Any, address: int, size_bytes: int, offset: int) -> None:
            read[0] += size_bytes
            real(self, address, size_bytes, offset)

        with runtime.init_module(empty_init=True):
            model = gpt(HEADS, GROUPS)
        data_file.DataFile.read_into = read_into  # type: ignore[method-assign]
        report = runtime.load_raw(folder, model, keys=maps().llama_to_litgpt(HEADS, GROUPS))
        assert report.is_exact
        assert read[0] == 0
        wrapped = runtime.setup(model)
        data_file.DataFile.read_into = real  # type: ignore[method-assign]
        owned = sum(p.to_local().numel() * 4 for p in model.parameters() if isinstance(p, DTensor))
        everything = open_checkpoint(folder).size_bytes
        assert read[0] == owned, (read[0], owned)
        assert owned < 0.6 * everything
        expected = logits(llama_with(folder, (HEADS, GROUPS, False)))
        torch.testing.assert_close(logits(wrapped), expected, rtol=1e-5, atol=1e-5)
        runtime.save(target, wrapped, format="safetensors", keys=maps().litgpt_to_llama(HEADS, GROUPS))
        runtime.barrier()
        # In one piece: ranks share the pipe.
        os.write(1, b"equal\n")
    finally:
        process_group.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
