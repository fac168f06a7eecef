"""The requests that the scheduler has: where each waits or runs, what it holds, and its way out."""

from __future__ import annotations

from headway.cache import KvCache, extend_digests
from headway.config import EngineConfig
from headway.messages import EngineOutput
from headway.messages.outputs import FinishReason
from headway.scheduler.decodes import Decodes
from headway.scheduler.queue import WaitingQueue
from headway.scheduler.slots import SlotTable
from headway.scheduler.state import RequestState
from headway.scheduler.stats import EngineStats


class Sequences:
    """Shared by planning and results, both on one thread.

    A request is in ``waiting``, or has a slot and blocks; of those with a slot, ``prefilling`` and ``decodes`` have
    something left to plan. releases: slots vacated since the last plan.
    """

    def __init__(self, config: EngineConfig) -> None:
        scheduler, cache, model = config.scheduler, config.cache, config.model
        num_slots = min(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)
        self.encoder = model.runner == "pooling"
        self.caching = cache.enable_prefix_caching and not self.encoder
        self.states: dict[str, RequestState] = {}
        self.waiting = WaitingQueue(scheduler.policy == "priority")
        self.slots = SlotTable(num_slots, model.max_model_len)
        self.kv = KvCache(
            num_blocks=max(cache.num_blocks, 1),
            block_size=cache.block_size,
            num_slots=num_slots,
            max_model_len=model.max_model_len,
            prefix_caching=self.caching,
        )
        self.prefilling: list[RequestState] = []
        self.decodes = Decodes(self.slots, config.parallel.pipeline_parallel_size, scheduler.depth)
        self.releases: list[int] = []
        self.stats = EngineStats(blocks_total=self.kv.pool.total)

    def register(self, state: RequestState, computed: int) -> None:
        """Makes the request's full blocks findable, up to ``computed`` positions."""
        full = computed // self.kv.block_size
        if full <= state.registered:
            return
        tokens = self.slots.tokens[state.slot, :computed]
        extend_digests(state.digests, tokens, self.kv.block_size, state.request.cache_salt)
        self.kv.register(state.slot, state.digests, state.registered, full)
        state.registered = full

    def vacate(self, state: RequestState) -> None:
        """The only way out of a slot: frees it and its blocks, whatever is in flight."""
        slot = state.slot
        if self.caching and state.prefilled:
            # Decoded blocks become findable here, once, and not step by step. The last token's position may not be
            # computed yet.
            self.register(state, int(self.slots.known[slot]) - 1)
        if state in self.prefilling:
            self.prefilling.remove(state)
        if not self.encoder:
            self.kv.release(slot)
        self.slots.leave(state)
        self.releases.append(slot)
        self.decodes.left()
        state.prefilled = False
        state.registered = 0

    def finish(
        self,
        state: RequestState,
        reason: FinishReason,
        *,
        stop_reason: int | None = None,
        pooled: bytes | None = None,
        error: str | None = None,
    ) -> EngineOutput:
        """The request's last output; it is gone afterwards."""
        output = self.output(state)
        output.finish_reason = reason
        output.stop_reason = stop_reason
        output.pooled = pooled
        output.error = error
        if state.slot >= 0:
            self.vacate(state)
        else:
            self.waiting.remove(state)
        del self.states[state.id]
        return output

    def output(self, state: RequestState) -> EngineOutput:
        """What is new of a request since its last output."""
        told = state.prompt_len + state.delivered
        if state.slot >= 0:
            new = self.slots.tokens[state.slot, told : self.slots.known[state.slot]].tolist()
        else:
            new = state.tokens[told:].tolist()
        state.delivered += len(new)
        output = EngineOutput(request_id=state.id, token_ids=new, num_cached_tokens=max(state.cached_tokens, 0))
        sampling = state.request.sampling
        if sampling is not None and sampling.logprobs is not None:
            output.logprobs, state.logprobs = state.logprobs, []
        if sampling is not None and sampling.prompt_logprobs is not None and not state.prompt_logprobs_delivered:
            output.prompt_logprobs, state.prompt_logprobs_delivered = state.prompt_logprobs, True
        return output
