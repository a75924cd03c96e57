"""Prints how fast the quantizers are, beside bitsandbytes in the same run: `python quantizers.py [--size 4096]`.

Pieces of a weight are converted by threads of Python's, like when a model is set up. Nothing here is asserted: figures
depend on the machine, and on what else it does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from nucleate.deferred.elements import Conversion
from nucleate_bitsandbytes.library import bitsandbytes
from nucleate_bitsandbytes.quantizers import FourBit, Int8Rows


def fastest(action: Callable[[], object], repeats: int = 5) -> float:
    elapsed_s = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        elapsed_s.append(time.perf_counter() - start)
    return min(elapsed_s[1:])


def convert(conversion: Conversion, weight: Tensor, piece_numel: int, pool: ThreadPoolExecutor | None) -> None:
    layout = conversion.layout(tuple(weight.shape), weight.dtype)
    outs = [torch.empty(out.shape, dtype=out.dtype) for out in layout.outputs]
    flat = weight.view(-1)
    num_blocks = -(-flat.numel() // layout.block_numel)
    step = max(1, piece_numel // layout.block_numel)

    def piece(first: int) -> None:
        last = min(num_blocks, first + step)
        parts = [out.view(-1)[slice(*made.range(first, last))] for out, made in zip(outs, layout.outputs, strict=True)]
        conversion.convert(flat[first * layout.block_numel : last * layout.block_numel], parts)

    for _ in (pool.map if pool else map)(piece, range(0, num_blocks, step)):
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    size: int = parser.parse_args().size
    library = bitsandbytes()
    weight = torch.randn(size, size) * 0.02
    print(f"{size} x {size}, torch threads: {torch.get_num_threads()}; ns for an element")
    print("dtype     to    bitsandbytes  piece 2^15: 1 thread, 2 threads   2^18: 1, 2     2^20: 1, 2")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = weight.to(dtype)
        theirs: dict[str, Callable[[], object]] = {
            "nf4": lambda values=values: library.functional.quantize_4bit(values, quant_type="nf4"),
            "fp4": lambda values=values: library.functional.quantize_4bit(values, quant_type="fp4"),
            "int8": lambda values=values: library.nn.Int8Params(values, requires_grad=False).to("cpu"),
        }
        for name, conversion in (("nf4", FourBit("nf4")), ("fp4", FourBit("fp4")), ("int8", Int8Rows())):
            figures = [fastest(theirs[name], 1)]
            for numel in (1 << 15, 1 << 18, 1 << 20):
                with ThreadPoolExecutor(2) as pool:
                    for threads in (None, pool):
                        figures.append(fastest(lambda c=conversion, n=numel, t=threads, v=values: convert(c, v, n, t)))
            ns = [f"{figure / weight.numel() * 1e9:8.2f}" for figure in figures]
            print(f"{str(dtype).removeprefix('torch.'):9} {name:5}", *ns)


if __name__ == "__main__":
    main()
