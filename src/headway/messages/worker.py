"""What a worker says of itself once it is ready."""

from __future__ import annotations

import msgspec


class WorkerInfo(msgspec.Struct, kw_only=True):
    """What start() reports.

    vocab_size: logits a row, 0 for encoders. kernels: which ran, with their instruction set. startup_s: seconds by
    phase ("load", "prepare", "warm-up").
    """

    executor: str
    num_blocks: int
    block_size: int
    vocab_size: int
    threads: int
    kernels: str
    program: bool
    weights_bytes: int
    kv_bytes: int
    startup_s: dict[str, float]
