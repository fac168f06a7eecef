"""What this machine's cores and memory give the kernels: the ceilings to hold a benchmark against.

    python benchmarks/machine_limits.py

Arithmetic: a bfloat16 product whose weight stays in the second-level cache. Memory: a one-row product over 512 MB of
weights, on one thread and on all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from headway.ops.cpu import CpuOps


def best(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest run."""
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    for threads in (1, len(os.sched_getaffinity(0))):
        ops = CpuOps(threads=threads)
        small = ops.pack_linear(torch.randn(768 * threads, 256), dtype=torch.bfloat16)
        x = torch.randn(960, 256, dtype=torch.bfloat16)
        flops = 2 * x.shape[0] * small.out_features * small.in_features
        gflops = flops / best(lambda x=x, ops=ops, w=small: ops.linear(x, w), 200) / 1e9
        large = ops.pack_linear(torch.zeros(1 << 18, 1 << 10, dtype=torch.bfloat16), dtype=torch.bfloat16)
        row = torch.randn(1, 1 << 10, dtype=torch.bfloat16)
        gbytes = (512 << 20) / best(lambda x=row, ops=ops, w=large: ops.linear(x, w), 20) / 1e9
        print(f"{threads} thread(s), {ops.description}: {gflops:.0f} GFLOP/s, {gbytes:.1f} GB/s")


if __name__ == "__main__":
    main()
