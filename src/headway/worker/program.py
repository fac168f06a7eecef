"""The seam where one native call takes over a step: forward pass, logits and the choice of simple rows' tokens."""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

from headway.worker.batch import Batch
from headway.worker.extras import Float32Array, Int32Array


class Want(IntEnum):
    """What becomes of a row that ends in this step."""

    ARGMAX = 0
    SAMPLE = 1  # as the sampler documents, unless its logits are adjusted first
    LOGITS = 2  # left to the host


class Program(Protocol):
    """A decoder, or a pipeline stage of one, compiled for one KV cache.

    x: the residual stream, [max_tokens, K or more]. A stage without embedding begins with what its first rows hold; one
    without head leaves its result there and takes no rows.
    """

    x: Float32Array

    def run(
        self, batch: Batch, run_slots: Int32Array, run_tokens: Int32Array, rows: Int32Array, want: Int32Array
    ) -> Int32Array:
        """Computes the runs' tokens; keys and values go to the batch's blocks, the batch is left as it is.

        run_slots, run_tokens: [R]. rows: indices of the runs that sample; want: ``Want`` of each. Returns the token
        of each row (meaningless for LOGITS), valid until the next run.
        """
        ...

    def repeat(self) -> Int32Array:
        """The last run once more, one token each, every row simple; here the batch takes in the tokens and advances.

        The arrays given to run must not have moved. Returns the tokens, valid until the next run.
        """
        ...

    def logits(self, row: int) -> Float32Array:
        """[V] of a row that wanted LOGITS, valid until the next run."""
        ...
