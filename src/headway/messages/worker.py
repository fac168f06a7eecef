"""What a worker says of itself once it is ready."""

from __future__ import annotations

import msgspec


class WorkerInfo(msgspec.Struct, kw_only=True):
    """What start() reports.

    vocab_size: logits a row, 0 for encoders. threads: of each rank. kernels: which ran, with their instruction set.
    startup_s: seconds by phase ("load", "prepare", "warm-up"). max_model_len: where the ranks had to agree on less than
    was configured. pids: of the processes that run the ranks. The engine adds the executor's reason, ranks and depth.
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
    max_model_len: int | None = None
    pids: list[int] = []
    reason: str = ""
    ranks: int = 1
    depth: int = 0

    def __str__(self) -> str:
        shared = f"{self.ranks} rank{'s' * (self.ranks > 1)} of {self.threads} thread{'s' * (self.threads > 1)}"
        return f"executor {self.executor} ({self.reason}): {shared}, kernels {self.kernels}, depth {self.depth}"
