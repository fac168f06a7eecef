"""Log probabilities of one row, from the raw logits."""

from __future__ import annotations

import numpy as np

from headway.messages import RowLogprobs
from headway.worker.extras import Float32Array, TokenIds
from headway.worker.largest import largest


def row_logprobs(logits_V: Float32Array, token: int, count: int) -> RowLogprobs:
    """The token's log probability and rank, then the ``count`` most likely tokens'."""
    best = float(logits_V.max())
    normaliser = best + float(np.log(np.exp(logits_V - np.float32(best)).sum(dtype=np.float64)))
    ids = [token, *most_likely(logits_V, count).tolist()]
    return RowLogprobs(
        token_ids=ids,
        logprobs=(logits_V[ids].astype(np.float64) - normaliser).tolist(),
        rank=1 + int(np.count_nonzero(logits_V > logits_V[token])),
    )


def most_likely(logits_V: Float32Array, count: int) -> TokenIds:
    """The ids of the ``count`` largest logits, descending; the lower id first among equals."""
    count = min(count, len(logits_V))
    if count == 0:
        return np.empty(0, np.int64)
    ids = np.flatnonzero(logits_V >= largest(logits_V, count)[count - 1])
    return ids[np.argsort(-logits_V[ids], kind="stable")][:count]
