"""Continuous batching: requests in, step plans out; step results in, outputs out.

    add ──> waiting ──admit──> prefilling ──prompt planned──> decoding ──limit planned──> awaiting its last token
               ^                    │                            │                              │
               └─────── preempt ────┴────────────────────────────┘            stop or limit in a result: finished

Each step runs every decoding slot for one token (in a pipeline, those whose turn it is), then fills the token budget
with prompts. A prompt that fits in what is left runs whole. At most one prompt a step is cut: the first that does not
fit. It leaves half of what is left to the prompts behind it that fit there whole, so a long prompt neither stalls
decodes nor short prompts, and no step is made of slivers. Under optimize_for="latency" prompts get no more of a step
than its decodes have, or BESIDE_DECODES tokens: where the model's time goes with its rows, who streams waits at most
about twice as long as without them. A prompt's blocks are claimed when it enters its slot;
decodes claim one block at a time, and when there is none the latest request (under "priority": of the lowest priority)
goes back to the head of the queue with what it has generated, to be prefilled again.

Plans depend only on counts, never on token values, so a step can be planned while others run. Workers run plans in
order: a slot and its blocks can be given on at once, and a result for a slot's former occupant is told by the slot's
epoch. Nothing here reads a clock, iterates a set or hashes an identity: the same commands give the same plans.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy
from itertools import islice

import numpy as np

from headway.cache import extend_digests
from headway.config import EngineConfig
from headway.errors import RequestError
from headway.messages import EngineOutput, Request, SlotStart, StepPlan, StepResult
from headway.scheduler.checks import check, runs_whole
from headway.scheduler.flight import Chunk, InFlight, encode_runs, slot_start
from headway.scheduler.results import Results
from headway.scheduler.sequences import Sequences
from headway.scheduler.slots import Slots
from headway.scheduler.state import RequestState
from headway.scheduler.stats import EngineStats

BESIDE_DECODES = 64


class Scheduler:
    """accept(request id, token): told each token of structured requests; False ends the request with an error."""

    def __init__(self, config: EngineConfig, accept: Callable[[str, int], bool] | None = None) -> None:
        sequences = self._sequences = Sequences(config)
        self._results = Results(sequences, accept)
        self._waiting, self._slots, self._kv = sequences.waiting, sequences.slots, sequences.kv
        self._prefilling, self._decodes, self._stats = sequences.prefilling, sequences.decodes, sequences.stats
        self._config = config
        self._budget = config.scheduler.max_num_batched_tokens
        self._bounds_prefill = config.scheduler.optimize_for == "latency"
        self._by_priority = config.scheduler.policy == "priority"
        self._whole = runs_whole(config)
        self._watermark = self._kv.pool.total // 100
        self._arrivals = 0
        self._last: deque[Slots] = deque(maxlen=config.parallel.pipeline_parallel_size)  # what the last plans run
        self._in_flight: deque[InFlight] = deque()
        self._step = 0

    @property
    def has_requests(self) -> bool:
        return bool(self._sequences.states)

    def add(self, request: Request) -> None:
        """Raises RequestError for a request that can never run; nothing has changed then."""
        if request.request_id in self._sequences.states:
            raise RequestError("request_id", request.request_id, "is in use by a request that has not finished")
        prompt = check(request, self._config)
        state = RequestState(request, self._arrivals, prompt)
        self._arrivals += 1
        self._sequences.states[request.request_id] = state
        self._waiting.append(state)

    def abort(self, request_id: str, error: str | None = None) -> EngineOutput | None:
        """Ends a request now, whatever is in flight, because of an error if one is given; None if it is not here."""
        state = self._sequences.states.get(request_id)
        if state is None:
            return None
        return self._sequences.finish(state, "abort" if error is None else "error", error=error)

    def drop_prefix_cache(self) -> None:
        """What the cache holds is not what the model would compute. Only while there are no requests."""
        assert not self._sequences.states, "requests hold blocks"
        self._kv.pool.drop_cached()

    def request_at(self, slot: int) -> str:
        """The id of the request in a slot."""
        return self._slots.occupant(slot).id

    def stats(self) -> EngineStats:
        self._stats.running = self._slots.occupied
        self._stats.waiting = len(self._waiting)
        self._stats.blocks_used = self._kv.pool.referenced
        self._stats.steps = self._step
        return copy(self._stats)

    def update(self, result: StepResult) -> list[EngineOutput]:
        """Takes in the oldest unanswered plan's result; outputs for requests that ended or stream."""
        return self._results.take(self._in_flight.popleft(), result)

    def plan(self) -> StepPlan | None:
        """What to run next, None if nothing can. Each plan is answered by one ``update``, in order."""
        decodes, blocks = self._plan_decodes()
        starts: list[SlotStart] = []
        chunks: list[Chunk] = []
        if self._prefilling or (self._waiting and self._slots.free):
            chunks = self._plan_chunks(self._room_beside(decodes.size), starts)
        if not decodes.size and not chunks:
            decodes, blocks = self._plan_decodes(early=True)
            if not decodes.size:
                return None
        slots = decodes
        if chunks:
            slots = np.concatenate((decodes, np.array([chunk.state.slot for chunk in chunks], np.int64)))
        repeats = len(self._last) == self._last.maxlen and not (starts or self._sequences.releases)
        plan = StepPlan(
            step=self._step,
            releases=self._sequences.releases,
            starts=starts,
            blocks=blocks,
            runs=encode_runs(slots, chunks, self._last[0] if repeats else None),
            masked_slots=self._masked_slots(decodes, chunks),
        )
        self._in_flight.append(InFlight(self._step, slots, self._slots.epoch[slots], chunks, plan.masked_slots))
        self._sequences.releases = []
        self._last.append(slots)
        self._advance(decodes, chunks)
        self._step += 1
        return plan

    def _room_beside(self, decodes: int) -> int:
        """Tokens of prompts that a step may have."""
        room = self._budget - decodes
        return min(room, max(decodes, BESIDE_DECODES)) if decodes and self._bounds_prefill else room

    def _plan_decodes(self, *, early: bool = False) -> tuple[Slots, list[int]]:
        """This step's decodes, with a block for each that is about to enter a new one, preempting until there are."""
        while True:
            decodes = self._decodes.turn(self._step, early=early)
            crossing = decodes[self._slots.computed[decodes] >= self._kv.table.capacity[decodes]]
            if crossing.size <= self._kv.pool.available:
                return decodes, self._kv.grow(crossing) if crossing.size else []
            self._preempt()

    def _preempt(self) -> None:
        """Sends the last in rank back to the queue. Requests that only await their last token are left alone."""
        victims = [*self._prefilling, *(self._slots.occupant(slot) for slot in self._decodes.all().tolist())]
        victim = max(victims, key=self._rank)
        self._sequences.vacate(victim)
        if victim.wants_prompt_logprobs:
            victim.prompt_logprobs.clear()
        self._waiting.push_front(victim)
        self._stats.preemptions += 1

    def _rank(self, state: RequestState) -> tuple[int, int]:
        return self._waiting.priority(state), state.arrival

    def _plan_chunks(self, room: int, starts: list[SlotStart]) -> list[Chunk]:
        """Prompts for the budget that decodes leave, by the rule at the top of this file."""
        chunks: list[Chunk] = []
        cut: RequestState | None = None
        spare = 0
        full = False
        for state in self._candidates():
            if room <= 0:
                break
            if full and state.slot < 0:
                continue
            hits = self._find_hits(state) if state.slot < 0 else []
            need = self._remaining(state, hits)
            if need > room and self._whole:
                break  # those behind it wait too, or it might wait for ever
            if need > room and cut is not None:
                continue
            if state.slot < 0:
                start = self._admit(state, hits)
                if start is None:
                    full = True  # nobody overtakes it into a slot; prompts that have one go on
                    continue
                starts.append(start)
            if need <= room:
                chunks.append(self._chunk(state, need))
                room -= need
            else:
                cut, spare, room = state, room - room // 2, room // 2
        if cut is not None:
            chunks.append(self._chunk(cut, spare + room))
        return chunks

    def _candidates(self) -> list[RequestState]:
        candidates = [*self._prefilling, *islice(self._waiting, self._slots.free)]
        if self._by_priority:
            candidates.sort(key=self._waiting.priority)
        return candidates

    def _remaining(self, state: RequestState, hits: list[int]) -> int:
        if state.slot < 0:
            return len(state.tokens) - len(hits) * self._kv.block_size
        return int(self._slots.known[state.slot] - self._slots.computed[state.slot])

    def _chunk(self, state: RequestState, tokens: int) -> Chunk:
        return Chunk(state, tokens, int(self._slots.computed[state.slot]) + tokens)

    def _find_hits(self, state: RequestState) -> list[int]:
        if not self._sequences.caching or not state.may_reuse:
            return []
        extend_digests(state.digests, state.tokens, self._kv.block_size, state.request.cache_salt)
        return self._kv.find(state.digests, len(state.tokens))

    def _admit(self, state: RequestState, hits: list[int]) -> SlotStart | None:
        """Gives a waiting request a slot and its blocks; None if there are too few blocks now."""
        slot, size = self._slots.next_free(), len(state.tokens)
        blocks: list[int] | None = []
        if not self._sequences.encoder:
            blocks = self._kv.claim(slot, hits, size, self._spare_blocks(state))
        if blocks is None:
            return None
        computed = len(hits) * self._kv.block_size
        self._waiting.remove(state)
        self._slots.enter(state, computed)
        self._prefilling.append(state)
        state.registered = len(hits)
        if state.cached_tokens < 0:
            state.cached_tokens = computed
            self._stats.prompt_tokens += state.prompt_len
            self._stats.prefix_hit_tokens += computed
        return slot_start(state, computed, blocks)

    def _spare_blocks(self, state: RequestState) -> int:
        """Blocks to leave when a request enters: its own next one, and room for those that already run."""
        size = len(state.tokens)
        own = self._kv.blocks_for(max(min(size + 1, state.max_computed), size)) - self._kv.blocks_for(size)
        return own + (self._watermark if self._slots.occupied else 0)

    def _masked_slots(self, decodes: Slots, chunks: list[Chunk]) -> list[int]:
        """Structured requests that sample in this step."""
        if not self._slots.masked.any():
            return []
        masked = decodes[self._slots.masked[decodes]].tolist()
        return masked + [c.state.slot for c in chunks if c.state.masked and c.end == self._slots.known[c.state.slot]]

    def _advance(self, decodes: Slots, chunks: list[Chunk]) -> None:
        """Books a planned step: counts move on as if it had run."""
        slots = self._slots
        computed = slots.computed[decodes] + 1
        slots.computed[decodes] = computed
        at_limit = computed + 1 >= slots.limit[decodes]
        if at_limit.any():
            slots.decoding[decodes[at_limit]] = False
            self._decodes.left()
        self._decodes.ran(decodes, self._step)
        joining: list[int] = []
        for chunk in chunks:
            slot = chunk.state.slot
            slots.computed[slot] = chunk.end
            if chunk.end < slots.known[slot]:
                continue
            self._prefilling.remove(chunk.state)
            if chunk.state.request.pooling is None and chunk.end + 1 < slots.limit[slot]:
                slots.decoding[slot] = True
                joining.append(slot)
        if joining:
            self._decodes.join(joining, self._step)
