"""The seam where one native call takes over a step's forward pass, its logits and the sampling of simple rows."""

from __future__ import annotations

from typing import Protocol

from headway.worker.batch import Batch
from headway.worker.extras import Float32Array, Int32Array


class Program(Protocol):
    """A decoder compiled for one KV cache."""

    def run(self, batch: Batch, run_slots: Int32Array, run_tokens: Int32Array, sample_rows: Int32Array) -> Float32Array:
        """Computes the runs' tokens (keys and values of the batch's blocks are written) and samples ``sample_rows``.

        A simple row's token (its kind lacks NEEDS_LOGITS) is written to tokens[slot, length], drawn as the sampler
        documents; the batch is left as it is otherwise. run_slots, run_tokens: int32 [R]; sample_rows index into them.
        Returns the logits of the other sample rows, in order: float32 [rows, V], valid until the next run.
        """
        ...
