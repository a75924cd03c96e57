"""The time that the machine itself takes to read files, or to touch memory: the floors under every loader.

    python -m tests.bench.bare touch --bytes 1000000000 --threads 2
    python -m tests.bench.bare read-direct --paths FILE FILE --threads 4

Files are read cold, by several threads in blocks of 8 MiB, each into one buffer of its own: past the page cache, or
through it. Anonymous memory is mapped and touched by several threads, in small pages or in huge ones: each page by a
write, as a loader does that copies into it, or by the kernel (`MADV_POPULATE_WRITE`), which is faster for small ones.
Under torchrun each rank touches as many bytes.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from tests.bench.checkpoint_files import BLOCK_BYTES, drop
from tests.bench.memory import cached_bytes
from tests.bench.ranks import barrier, report_and_end
from tests.bench.state import add_state, enter

_MADV_POPULATE_WRITE = 23
_MAP_FAILED = ctypes.c_void_p(-1).value
#: A thread touches that many bytes by one call.
_PIECE_BYTES = 2**24


def read(paths: Sequence[Path], threads: int, direct: bool) -> int:
    """Read files from one end to the other; return how many bytes there were."""
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    opened = [os.open(path, flags) for path in paths]
    blocks = [
        (file, offset)
        for path, file in zip(paths, opened, strict=True)
        for offset in range(0, path.stat().st_size, BLOCK_BYTES)
    ]
    queue = iter(blocks)

    def work(_: int) -> int:
        num_bytes = 0
        # Memory of a mapping begins at a page, as O_DIRECT wants it.
        with closing(mmap.mmap(-1, BLOCK_BYTES)) as buffer:
            for file, offset in queue:
                num_bytes += os.preadv(file, [buffer], offset)
        return num_bytes

    try:
        return _sum_in_threads(work, threads)
    finally:
        for file in opened:
            os.close(file)


def touch(num_bytes: int, threads: int, populate: bool = False, huge: bool = False) -> int:
    """Map memory, touch every page and give it back; return how many bytes there were."""
    # Not Python's own mapping: its calls keep the interpreter's lock.
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    num_bytes = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = libc.mmap(None, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), f"{num_bytes} bytes cannot be mapped")
    libc.madvise(address, num_bytes, mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    queue = iter(range(0, num_bytes, _PIECE_BYTES))

    def work(_: int) -> int:
        touched = 0
        for offset in queue:
            count = min(_PIECE_BYTES, num_bytes - offset)
            if populate:
                if libc.madvise(address + offset, count, _MADV_POPULATE_WRITE) != 0:
                    raise OSError(ctypes.get_errno(), "this kernel has no MADV_POPULATE_WRITE: it needs Linux 5.14")
            else:
                piece = (ctypes.c_uint8 * count).from_address(address + offset)
                torch.frombuffer(piece, dtype=torch.uint8)[:: mmap.PAGESIZE].fill_(1)
            touched += count
        return touched

    try:
        return _sum_in_threads(work, threads)
    finally:
        libc.munmap(address, num_bytes)


def _sum_in_threads(work: Callable[[int], int], threads: int) -> int:
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument(
        "--paths", type=Path, nargs="*", default=[], help="the files to read; they are dropped from memory first"
    )
    parser.add_argument("--bytes", type=int, default=0, help="how much to touch, on each rank")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="by default torch's own number")
    add_state(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        dist.init_process_group("gloo")
    touch(_PIECE_BYTES, args.threads, populate=args.way == "touch")
    if args.paths:
        drop(args.paths)
    barrier()
    enter(args.state, args.bytes or BLOCK_BYTES * args.threads, processes, args.idle_s)
    barrier()
    cached = cached_bytes()
    start, cpu_start = time.perf_counter(), time.process_time()
    num_bytes = WAYS[args.way](args)
    report_and_end(
        {
            "load_s": time.perf_counter() - start,
            "cpu_s": time.process_time() - cpu_start,
            "num_bytes": num_bytes,
            "cached_bytes": max(0, cached_bytes() - cached),
        }
    )


WAYS: dict[str, Callable[[argparse.Namespace], int]] = {
    "read-direct": lambda args: read(args.paths, args.threads, direct=True),
    "read-buffered": lambda args: read(args.paths, args.threads, direct=False),
    "touch": lambda args: touch(args.bytes, args.threads, populate=True),
    "touch-pages": lambda args: touch(args.bytes, args.threads),
    "touch-huge": lambda args: touch(args.bytes, args.threads, huge=True),
}

if __name__ == "__main__":
    main()
