"""What a request must satisfy to be scheduled at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from headway.config import EngineConfig
from headway.errors import RequestError
from headway.messages import Request


def check(request: Request, config: EngineConfig) -> npt.NDArray[np.int32]:
    """The prompt as an array; RequestError for a request that this engine can never run."""
    pooling_engine = config.model.runner == "pooling"
    if (request.sampling is None) == (request.pooling is None):
        raise RequestError("sampling", request.sampling, "give exactly one of sampling and pooling")
    if pooling_engine and request.sampling is not None:
        raise RequestError("sampling", request.request_id, "this engine pools (runner='pooling'); it cannot generate")
    prompt = _as_int32("prompt_token_ids", request.prompt_token_ids)
    _as_int32("stop_token_ids", request.stop_token_ids)
    if not prompt.size:
        raise RequestError("prompt_token_ids", [], "needs at least one token")
    generated = 0 if request.sampling is None else request.max_tokens
    if request.sampling is not None and generated < 1:
        raise RequestError("max_tokens", generated, "must be at least 1")
    limit = config.model.max_model_len
    if prompt.size + generated > limit:
        what = f"{prompt.size} prompt tokens" + (f" and {generated} to generate" if generated else "")
        raise RequestError("prompt_token_ids", what, f"max_model_len={limit} tokens fit")
    check_room(request, config)
    return prompt


def check_room(request: Request, config: EngineConfig) -> None:
    """RequestError for one that is fine but for what it takes of a step or of the cache."""
    generated = 0 if request.sampling is None else request.max_tokens
    computed = len(request.prompt_token_ids) + max(generated - 1, 0)
    _check_step(request, computed, config)
    if config.model.runner != "pooling":
        _check_pool(computed, config)


def runs_whole(config: EngineConfig) -> bool:
    """Whether a prompt runs in one step: encoders attend in both directions."""
    return config.model.runner == "pooling" or not config.scheduler.enable_chunked_prefill


def _check_step(request: Request, computed: int, config: EngineConfig) -> None:
    budget = config.scheduler.max_num_batched_tokens
    # After preemption a sequence is prefilled again with all that it had generated.
    if runs_whole(config) and computed > budget:
        raise RequestError("prompt_token_ids", f"{computed} tokens", f"one step runs max_num_batched_tokens={budget}")


def _check_pool(computed: int, config: EngineConfig) -> None:
    size = config.cache.block_size
    needed, total = -(-computed // size), config.cache.num_blocks - 1
    if needed > total:
        accepted = (
            f"the KV cache holds {total * size} tokens: shorten the prompt, lower max_tokens or give it more memory"
        )
        raise RequestError("prompt_token_ids", f"{computed} tokens", accepted)


def _as_int32(field: str, values: Sequence[int]) -> npt.NDArray[np.int32]:
    try:
        return np.array(values, np.int32)
    except (OverflowError, TypeError, ValueError) as error:
        raise RequestError(field, values, "must be token ids") from error
