"""One request while the scheduler has it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headway.messages import Request, RowLogprobs, SamplingParams


@dataclass(slots=True, eq=False)
class RequestState:
    """slot: where it runs, -1 while it waits. tokens: int32, all known tokens while it waits (a slot holds them else).

    digests: of its full blocks, as far as hashed. registered: blocks of this stay in a slot that are findable or
    shared. prefilled: every token it entered the slot with is computed. delivered: generated tokens handed out.
    cached_tokens: prefix hits at first admission, -1 before it. Logprob rows wait here until they are delivered.
    """

    request: Request
    arrival: int
    tokens: npt.NDArray[np.int32]
    slot: int = -1
    digests: list[bytes] = field(default_factory=list)
    registered: int = 0
    prefilled: bool = False
    delivered: int = 0
    cached_tokens: int = -1
    logprobs: list[RowLogprobs] = field(default_factory=list)
    prompt_logprobs: list[RowLogprobs] = field(default_factory=list)
    prompt_logprobs_delivered: bool = False

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def masked(self) -> bool:
        return self.request.sampling is not None and self.request.sampling.structured is not None

    @property
    def max_computed(self) -> int:
        """Positions it computes at most: the last token that it generates is never run."""
        return self.prompt_len + (self.request.max_tokens - 1 if self.request.sampling is not None else 0)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether rows for prompt positions are still missing."""
        sampling = self.request.sampling
        if sampling is None or sampling.prompt_logprobs is None or self.prompt_logprobs_delivered:
            return False
        return len(self.prompt_logprobs) < self.prompt_len - 1

    @property
    def may_reuse(self) -> bool:
        """Whether a prefix hit serves it: pooling and prompt log probabilities need every position computed."""
        return self.request.pooling is None and not self.wants_prompt_logprobs

    def named_stop(self, token: int) -> int | None:
        """The token, if it is one that the caller named to stop at."""
        sampling: SamplingParams | None = self.request.sampling
        return token if sampling is not None and token in (sampling.stop_token_ids or ()) else None
