"""How the engine schedules changes no token: the demo model in bfloat16, its step compiled.

Tokens are compared exactly: a kernel's result for a row may not depend on what else is in the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from headway import LLM, RequestOutput, SamplingParams
from headway.config import machine_facts

pytestmark = pytest.mark.skipif(
    not machine_facts().has_cpu_kernels, reason="torch's own bfloat16 products depend on how many rows there are"
)

SHARED = "A list of European countries and their capital cities, each followed by a short remark on the food there. "
PROMPTS = [
    "The capital of France is",
    SHARED + "France:",
    SHARED + "Italy:",
    "def fibonacci(n):",
    SHARED * 4 + "Spain:",
    "Once upon a time there was a",
]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.9, top_p=0.9, seed=1, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, top_k=40, seed=2, max_tokens=33, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=17, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.7, top_p=0.8, min_p=0.02, seed=3, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=4, max_tokens=25, ignore_eos=True, repetition_penalty=1.1),
]
BASE: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8}
BLOCK_BYTES = 16 * 23040


@contextmanager
def running(**settings: Any) -> Iterator[LLM]:
    with LLM("smollm2-135m-instruct", **{**BASE, **settings}) as llm:
        assert llm.executor_info.program and llm.config.model.dtype == "bfloat16"
        yield llm


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Each request by itself, every prompt in one piece, nothing planned ahead, no block reused."""
    with running(async_scheduling=False, enable_prefix_caching=False) as llm:
        return [tokens(llm.generate(prompt, params))[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def whole(llm: LLM) -> None:
    assert llm.metrics().preemptions == 0


def reused(llm: LLM) -> None:
    assert llm.metrics().prefix_hit_tokens > 0


def preempted(llm: LLM) -> None:
    assert llm.metrics().preemptions > 0


WAYS: list[tuple[dict[str, Any], Callable[[LLM], None]]] = [
    ({"async_scheduling": False, "enable_prefix_caching": False}, whole),
    ({"async_scheduling": True, "enable_prefix_caching": False}, whole),
    ({"max_num_batched_tokens": 16}, whole),
    ({"max_num_seqs": 1}, reused),
    ({"enable_chunked_prefill": False}, whole),
    ({"kv_cache_memory_bytes": 17 * BLOCK_BYTES}, preempted),
    ({"kv_cache_memory_bytes": 17 * BLOCK_BYTES, "async_scheduling": False, "max_num_batched_tokens": 24}, preempted),
]


@pytest.mark.parametrize(("settings", "happened"), WAYS, ids=[" ".join(s) for s, _ in WAYS])
def test_the_tokens_are_those_of_each_request_alone(
    settings: dict[str, Any], happened: Callable[[LLM], None], alone: list[list[int]]
) -> None:
    with running(**settings) as llm:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == alone
        happened(llm)
        again = llm.generate(PROMPTS, PARAMS)
        assert tokens(again) == alone
        assert any(o.num_cached_tokens for o in again) == llm.config.cache.enable_prefix_caching
        assert llm.metrics().blocks_used == 0


def test_samples_of_one_prompt_are_those_of_single_requests() -> None:
    params = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 16, "ignore_eos": True}
    with running() as llm:
        (together,) = llm.generate(PROMPTS[1], SamplingParams(n=4, seed=5, **params))
        singles = [llm.generate(PROMPTS[1], SamplingParams(seed=5 + i, **params)) for i in range(4)]
    assert [c.token_ids for c in together.outputs] == [tokens(single)[0] for single in singles]
    assert [c.index for c in together.outputs] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in together.outputs}) == 4


def chosen(output: RequestOutput) -> list[float]:
    """The log probability of each generated token."""
    (answer,) = output.outputs
    return [step[token].logprob for step, token in zip(answer.logprobs or [], answer.token_ids, strict=True)]


def test_prompt_logprobs_survive_preemption_and_chunks() -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, prompt_logprobs=1, logprobs=1)
    with running() as llm:
        expected = [llm.generate(prompt, params)[0] for prompt in PROMPTS]
    with running(kv_cache_memory_bytes=17 * BLOCK_BYTES, max_num_batched_tokens=24) as llm:
        found = llm.generate(PROMPTS, params)
        preempted(llm)
    assert tokens(found) == tokens(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.prompt_logprobs is not None and len(one.prompt_logprobs) == len(one.prompt_token_ids)
        assert one.prompt_logprobs == other.prompt_logprobs
        assert chosen(one) == pytest.approx(chosen(other), abs=0.03)  # a decode beside a prompt runs no program
