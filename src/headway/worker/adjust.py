"""What changes a row's logits before temperature: bias, bad words, min_tokens, masks, penalties, in that order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from headway.worker.extras import Float32Array, Int32Array, SlotExtras

if TYPE_CHECKING:
    from headway.worker.batch import Batch


def adjust_logits(logits_V: Float32Array, batch: Batch, slot: int, mask: bytes | None) -> None:
    """Applies a slot's adjustments in place. mask: bit t allows token t; ids beyond it are forbidden."""
    prompt_len, length = int(batch.prompt_len[slot]), int(batch.length[slot])
    known = batch.tokens[slot, :length]
    extras = batch.extras.get(slot)
    if extras is not None:
        _apply_extras(logits_V, extras, known[prompt_len:], int(batch.min_tokens[slot]))
    if mask is not None:
        _apply_mask(logits_V, mask)
    _penalise_repetition(logits_V, known, batch.repetition[slot])
    _penalise_output(logits_V, known[prompt_len:], batch.presence[slot], batch.frequency[slot])


def _apply_extras(logits_V: Float32Array, extras: SlotExtras, output: Int32Array, min_tokens: int) -> None:
    logits_V[extras.bias_ids] += extras.bias
    for length, complete in extras.bad_words.items():
        if length <= len(output) and (tokens := complete.get(output[len(output) - length :].tobytes())):
            logits_V[tokens] = -np.inf
    if len(output) < min_tokens:
        logits_V[extras.stop_ids] = -np.inf


def _apply_mask(logits_V: Float32Array, mask: bytes) -> None:
    allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little", count=len(logits_V))
    logits_V[allowed == 0] = -np.inf


def _penalise_repetition(logits_V: Float32Array, known: Int32Array, penalty: np.float32) -> None:
    """Prompt and output tokens alike (Keskar et al., CTRL, 2019)."""
    if penalty != 1:
        seen = logits_V[known]
        logits_V[known] = np.where(seen > 0, seen / penalty, seen * penalty)


def _penalise_output(logits_V: Float32Array, output: Int32Array, presence: np.float32, frequency: np.float32) -> None:
    if (presence or frequency) and len(output):
        ids, counts = np.unique(output, return_counts=True)
        logits_V[ids] -= presence + frequency * counts.astype(np.float32)
