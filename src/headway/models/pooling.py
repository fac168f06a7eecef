"""From hidden states and class logits to what a pooling request gets back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from headway.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from headway.messages import PoolingParams
    from headway.models.spec import PoolingSpec


def embedding(pooled_K: Tensor, params: PoolingParams, spec: PoolingSpec) -> Tensor:
    """float32 [dimensions or K], cut and then normalised."""
    vector = pooled_K.float()
    if params.dimensions is not None:
        if params.dimensions > len(vector):
            raise RequestError("dimensions", params.dimensions, f"must be at most {len(vector)}")
        vector = vector[: params.dimensions]
    normalize = spec.normalize if params.normalize is None else params.normalize
    return F.normalize(vector, dim=0) if normalize else vector


def scores(logits_L: Tensor, params: PoolingParams, spec: PoolingSpec) -> Tensor:
    """float32 [L] for "classify", [1] for "score". Raises RequestError for a score of several labels."""
    logits = logits_L.float()
    if params.task == "score" and len(logits) != 1:
        raise RequestError("task", "score", f"needs a model with one label, this one has {len(logits)}: use classify")
    if params.activation is False:
        return logits
    match spec.score if params.task == "score" else spec.classify:
        case "softmax":
            return logits.softmax(-1)
        case "sigmoid":
            return logits.sigmoid()
        case "identity":
            return logits


def pool_tokens(hidden_TK: Tensor, spec: PoolingSpec) -> Tensor:
    """One prompt's hidden states to one float32 vector [K]."""
    match spec.pooling:
        case "cls":
            return hidden_TK[0].float()
        case "last":
            return hidden_TK[-1].float()
        case "mean":
            return hidden_TK.mean(0, dtype=torch.float32)
        case "max":
            return hidden_TK.amax(0).float()
