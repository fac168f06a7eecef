"""Whatever happens around a request (chunking, preemption, prefix hits, aborts of others), it gets the tokens that it
gets alone. The fake executor checks every plan against the contract meanwhile."""

from __future__ import annotations

import numpy as np
from hypothesis import note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headway.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from headway.engine import EngineCore
from headway.errors import RequestError
from headway.executor.fake import FakeExecutor, FakeModel, FakeWorker, pooled_state, prefix_state
from headway.messages import EngineOutput, PoolingParams, Request, SamplingParams, StructuredOutput

MAX_LEN = 40
MODEL = FakeModel(vocab_size=64, eos_token_id=0, eos_probability=0.06)


class ThirdsMatcher:
    """Token t may come at place n unless (t + n) is a multiple of three."""

    def __init__(self) -> None:
        self.count = 0

    def allows(self, token: int) -> bool:
        return (token + self.count) % 3 != 0

    def mask(self) -> bytes:
        bits = [self.allows(token) for token in range(MODEL.vocab_size)]
        return np.packbits(bits, bitorder="little").tobytes()

    def accept(self, token_id: int) -> bool:
        allowed = self.allows(token_id)
        self.count += 1
        return allowed


class ThirdsBackend:
    def compile(self, constraint: StructuredOutput) -> ThirdsMatcher:
        if constraint.regex == "(":
            raise RequestError("regex", constraint.regex, "must be a regular expression")
        return ThirdsMatcher()


def alone(request: Request) -> tuple[list[int], str]:
    """What the model generates for a request, token by token."""
    params = request.sampling
    assert params is not None
    state, tokens = prefix_state(request.prompt_token_ids), []
    matcher = ThirdsMatcher() if params.structured is not None else None
    while True:
        forbidden = request.stop_token_ids if len(tokens) < params.min_tokens else []
        mask = matcher.mask() if matcher else None
        token = MODEL.next_token(state, request.seed)
        token = FakeWorker.first_allowed(token, forbidden, mask, MODEL.vocab_size)
        tokens.append(token)
        if token in request.stop_token_ids:
            return tokens, "stop"
        if len(tokens) == request.max_tokens:
            return tokens, "length"
        if matcher:
            matcher.accept(token)
        state = prefix_state([token], state)


prompts = st.builds(
    lambda shared, own: [1] * shared + own,
    st.sampled_from([0, 7, 16, 24]),
    st.lists(st.integers(1, 2), min_size=1, max_size=6),
)


@st.composite
def sampling_requests(draw: st.DrawFn, prompt: list[int] | None = None) -> Request:
    prompt = prompt or draw(prompts)
    max_tokens = draw(st.integers(1, MAX_LEN - len(prompt)))
    structured = draw(st.sampled_from([None, None, None, StructuredOutput(regex=".*")]))
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(3, max_tokens))),
        logprobs=draw(st.sampled_from([None, None, 1])),
        prompt_logprobs=draw(st.sampled_from([None, None, 1])),
        structured=structured,
    )
    return Request(
        request_id="",
        prompt_token_ids=prompt,
        sampling=sampling,
        max_tokens=max_tokens,
        seed=draw(st.integers(0, 2)),
        stop_token_ids=draw(st.sampled_from([[], [0], [0, 3], list(range(0, 30, 3))])),
        priority=draw(st.integers(0, 2)),
        stream=draw(st.booleans()),
        cache_salt=draw(st.sampled_from(["", "", "salt"])),
    )


configs = st.builds(
    lambda block_size, spare, caching, seqs, budget, policy, depth, stages: EngineConfig(
        model=ModelConfig(path="", served_model_name="", max_model_len=MAX_LEN),
        cache=CacheConfig(
            block_size=block_size, num_blocks=1 + -(-MAX_LEN // block_size) + spare, enable_prefix_caching=caching
        ),
        scheduler=SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=budget, policy=policy, depth=depth),
        parallel=ParallelConfig(pipeline_parallel_size=stages),
    ),
    st.sampled_from([2, 4, 8]),
    st.integers(0, 6),
    st.sampled_from([True, True, False]),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from(["fcfs", "priority"]),
    st.sampled_from([0, 1]),
    st.sampled_from([1, 1, 2, 3]),
)


class EngineMachine(RuleBasedStateMachine):
    @initialize(config=configs)
    def launch(self, config: EngineConfig) -> None:
        executor = FakeExecutor(config, MODEL)
        self.core = EngineCore(config, executor, executor.start(), ThirdsBackend())
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, list[EngineOutput]] = {}
        self.open: list[str] = []

    def _add(self, request: Request) -> None:
        request.request_id = f"r{len(self.requests)}"
        self.core.add(request)
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = []
        self.open.append(request.request_id)

    @rule(requests=st.lists(sampling_requests(), min_size=1, max_size=4))
    def generate(self, requests: list[Request]) -> None:
        for request in requests:
            self._add(request)

    @precondition(lambda self: len(self.open) < len(self.requests))
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A next turn: the prompt is an earlier request's prompt and answer, so decoded blocks may be reused."""
        before = data.draw(st.sampled_from([r for name, r in self.requests.items() if name not in self.open]))
        prompt = before.prompt_token_ids + [t for o in self.outputs[before.request_id] for t in o.token_ids] + [1]
        request = data.draw(sampling_requests(prompt[: MAX_LEN - 1]))
        request.cache_salt = before.cache_salt
        self._add(request)

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=MAX_LEN))
    def pool(self, prompt: list[int]) -> None:
        self._add(Request(request_id="", prompt_token_ids=prompt, pooling=PoolingParams()))

    @rule(bad=st.sampled_from(["prompt", "constraint", "name"]))
    def reject(self, bad: str) -> None:
        request = Request(request_id="bad", prompt_token_ids=[1], sampling=SamplingParams(), max_tokens=2)
        if bad == "prompt":
            request.prompt_token_ids = [1] * MAX_LEN
        elif bad == "constraint":
            request.sampling = SamplingParams(structured=StructuredOutput(regex="("))
        elif not self.open:
            return
        else:
            request.request_id = self.open[0]
        before = self.core.stats()
        try:
            self.core.add(request)
        except RequestError:
            assert self.core.stats() == before
        else:
            raise AssertionError("accepted")

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.open), max_size=2))
        outputs = self.core.abort(names)
        assert sorted(output.request_id for output in outputs) == sorted(set(names))
        self._take(outputs)

    @rule(count=st.integers(1, 12))
    def run(self, count: int) -> None:
        for _ in range(count):
            if self.core.has_work():
                self._take(self.core.step())

    def _take(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            assert output.request_id in self.open, "an output after the last"
            self.outputs[output.request_id].append(output)
            if output.finish_reason is not None:
                self.open.remove(output.request_id)
                self._check(self.requests[output.request_id], self.outputs[output.request_id])

    def _check(self, request: Request, outputs: list[EngineOutput]) -> None:
        last, aborted = outputs[-1], outputs[-1].finish_reason == "abort"
        note(f"{request} gave {outputs}")
        assert request.stream or len(outputs) == 1
        assert last.num_cached_tokens < len(request.prompt_token_ids)
        tokens = [token for output in outputs for token in output.token_ids]
        if request.pooling is not None:
            assert tokens == []
            assert aborted or last.pooled == pooled_state(prefix_state(request.prompt_token_ids))
            return
        expected, reason = alone(request)
        assert tokens == (expected[: len(tokens)] if aborted else expected)
        assert last.finish_reason in ("abort", reason)
        assert all(len(output.token_ids) == 1 for output in outputs[:-1]), "streams one token at a time"
        self._check_logprobs(request, outputs, tokens, aborted)

    def _check_logprobs(self, request: Request, outputs: list[EngineOutput], tokens: list[int], aborted: bool) -> None:
        assert request.sampling is not None
        if request.sampling.logprobs is not None:
            assert [row.token_ids[0] for output in outputs for row in output.logprobs or ()] == tokens
        else:
            assert all(output.logprobs is None for output in outputs)
        if request.sampling.prompt_logprobs is not None and not aborted:
            rows = [row.token_ids[0] for output in outputs for row in output.prompt_logprobs or ()]
            assert rows == request.prompt_token_ids[1:]
            assert outputs[0].prompt_logprobs is not None

    @invariant()
    def blocks_add_up(self) -> None:
        if hasattr(self, "core"):
            pool = self.core._scheduler._kv.pool
            assert pool.free + pool.cached + pool.referenced == pool.total

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        # No starvation: a step without progress on anybody's tokens would exceed this soon.
        work = sum(len(r.prompt_token_ids) + 2 * r.max_tokens for r in self.requests.values())
        bound = 50 + 4 * work * (1 + self.core.stats().preemptions)
        try:
            while self.core.has_work():
                self._take(self.core.step())
                bound -= 1
                assert bound > 0, "the engine makes no progress"
            assert not self.open
            stats = self.core.stats()
            assert stats.blocks_used == stats.running == stats.waiting == 0
        finally:
            self.core.close()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)
