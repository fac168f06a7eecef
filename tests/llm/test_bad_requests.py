"""A request that cannot be honoured is refused by name before it reaches a step, and costs its neighbours nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from headway import LLM, AsyncLLM, PoolingParams, SamplingParams, StructuredOutput
from headway.errors import ConfigError, ModelError, RequestError
from headway.llm import PromptInput
from headway.llm.frontend import find, start

PROMPT = "The capital of France is"
GREEDY = SamplingParams(temperature=0, max_tokens=12)
VOCAB = 49152

BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "prompt"),
    ([], "prompt_token_ids"),
    ("word " * 2_000_000, "prompt"),
    ([VOCAB], "prompt_token_ids"),
    ([5, -1], "prompt_token_ids"),
    ([1 << 40], "prompt_token_ids"),
    ([5] * 256, "prompt"),
    ([5] * 300, "prompt"),
    ([5, None], "prompt_token_ids"),
    ("\ud800", "prompt"),
    ({"prompt_token_ids": [5], "cache_salt": 3}, "cache_salt"),
    ({"prompt_token_ids": [5], "cache_salt": "\ud800"}, "cache_salt"),
    (PromptInput(), "prompt"),
    (PromptInput(text="x", cache_salt=3), "prompt"),  # type: ignore[arg-type]
    (PromptInput(token_ids=[5, 6], token_type_ids=[0]), "token_type_ids"),
    (PromptInput(token_ids=[5], token_type_ids=[1]), "token_type_ids"),
    (PromptInput(token_ids=[5], token_type_ids=[np.int64(0)]), "token_type_ids"),  # type: ignore[list-item]
]
BAD_PARAMS: list[tuple[Callable[[], Any], str]] = [
    (lambda: SamplingParams(logprobs=VOCAB + 1), "logprobs"),
    (lambda: SamplingParams(prompt_logprobs=VOCAB + 1), "prompt_logprobs"),
    (lambda: SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids"),
    (lambda: SamplingParams(stop_token_ids=["a"]), "stop_token_ids"),  # type: ignore[list-item]
    (lambda: SamplingParams(stop_token_ids=2), "stop_token_ids"),  # type: ignore[arg-type]
    (lambda: SamplingParams(stop=[3]), "stop"),  # type: ignore[list-item]
    (lambda: SamplingParams(stop=["\ud800"]), "stop"),
    (lambda: SamplingParams(stop="\ud800"), "stop"),
    (lambda: SamplingParams(bad_words=["\ud800"]), "bad_words"),
    (lambda: SamplingParams(ignore_eos=np.True_), "ignore_eos"),  # type: ignore[arg-type]
    (lambda: SamplingParams(ignore_eos=1), "ignore_eos"),  # type: ignore[arg-type]
    (lambda: StructuredOutput(choice=["\ud800"]), "structured.choice"),
    (lambda: SamplingParams(bad_words=[3]), "bad_words"),  # type: ignore[list-item]
    (lambda: SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias"),
    (lambda: SamplingParams(logit_bias={-1: 1.0}), "logit_bias"),
    (lambda: SamplingParams(logit_bias={"5": 1.0}), "logit_bias[5]"),  # type: ignore[dict-item]
    (lambda: SamplingParams(logit_bias={5: float("nan")}), "logit_bias[5]"),
    (lambda: SamplingParams(temperature=float("nan")), "temperature"),
    (lambda: SamplingParams(structured=StructuredOutput(regex="(")), "structured.regex"),
    (lambda: SamplingParams(structured=StructuredOutput(regex=5)), "structured.regex"),  # type: ignore[arg-type]
    (lambda: SamplingParams(structured=StructuredOutput(choice="yes")), "structured.choice"),  # type: ignore[arg-type]
    (lambda: {"temperature": 0}, "params"),
    (lambda: PoolingParams(task="classify"), "task"),
    (lambda: PoolingParams(task="score"), "task"),
    (lambda: PoolingParams(task="rank"), "task"),  # type: ignore[arg-type]
    (lambda: PoolingParams(normalize="no"), "normalize"),  # type: ignore[arg-type]
    (lambda: PoolingParams(dimensions=577), "dimensions"),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2-135m-instruct", max_model_len=256, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[int]:
    return llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids


def refused(llm: LLM, prompt: Any, params: Callable[[], Any]) -> str:
    steps = llm.metrics().steps
    with pytest.raises(RequestError) as caught:
        llm.generate([PROMPT, prompt], [GREEDY, params()])
    assert llm.metrics().steps == steps
    return caught.value.field.removeprefix("prompts[1].")


def test_numbers_of_a_kind_of_their_own_become_plain_ones() -> None:
    params = SamplingParams(temperature=np.float64(0.5), seed=signal.SIGTERM, logit_bias={5: np.float64(1)})
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert (params.temperature, params.seed, params.logit_bias) == (0.5, 15, {5: 1.0})


@pytest.mark.parametrize(("prompt", "field"), BAD_PROMPTS)
def test_a_bad_prompt_names_its_field(llm: LLM, expected: list[int], prompt: Any, field: str) -> None:
    assert refused(llm, prompt, lambda: GREEDY) == field
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize(("params", "field"), BAD_PARAMS)
def test_a_bad_parameter_names_itself(llm: LLM, expected: list[int], params: Callable[[], Any], field: str) -> None:
    assert refused(llm, PROMPT, params) == field
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == expected


def test_what_the_model_has_no_head_for_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="no classification head"):
        llm.classify(PROMPT)
    with pytest.raises(RequestError, match="dimensions=577: must be at most 576"):
        llm.embed(PROMPT, PoolingParams(dimensions=577))


def test_pooling_and_generating_share_a_step(llm: LLM, expected: list[int]) -> None:
    mixed = llm.generate([PROMPT, PROMPT], [GREEDY, PoolingParams(dimensions=16)])  # type: ignore[list-item]
    assert mixed[0].outputs[0].token_ids == expected
    assert mixed[1].data == pytest.approx(llm.embed(PROMPT, PoolingParams(dimensions=16))[0].data, abs=1e-2)  # type: ignore[attr-defined]


async def test_bad_requests_cost_running_neighbours_nothing(llm: LLM, expected: list[int]) -> None:
    async with AsyncLLM.over(*start(find("smollm2-135m-instruct", max_model_len=256, max_num_seqs=8))) as engine:

        async def whole(prompt: Any, params: Any, **options: Any) -> list[int]:
            return [t async for d in engine.generate(prompt, params, **options) for t in d.outputs[0].token_ids]

        async def refuse(prompt: Any, params: Callable[[], Any], **options: Any) -> None:
            with pytest.raises(RequestError):
                await whole(prompt, params(), **options)

        neighbours = [asyncio.create_task(whole(PROMPT, GREEDY)) for _ in range(4)]
        await asyncio.gather(
            *(refuse(prompt, lambda: GREEDY) for prompt, _ in BAD_PROMPTS),
            *(refuse(PROMPT, params) for params, _ in BAD_PARAMS),
            refuse(PROMPT, lambda: GREEDY, priority="high"),
        )
        assert await asyncio.gather(*neighbours) == [expected] * 4


def test_an_encoder_refuses_what_it_cannot_do() -> None:
    with LLM("all-minilm-l6-v2") as minilm:
        before = minilm.embed("x")[0].data
        for prompt, field in (([30522], "prompt_token_ids"), ([101] * 513, "prompt"), ([], "prompt_token_ids")):
            with pytest.raises(RequestError) as caught:
                minilm.embed([prompt])
            assert caught.value.field == field
        with pytest.raises(RequestError, match=r"token_type_ids=.*each 0 to 1"):
            minilm.embed(PromptInput(token_ids=[101, 102], token_type_ids=[0, 2]))
        with pytest.raises(RequestError, match="cannot generate"):
            minilm.generate("x")
        assert minilm.embed("x")[0].data == before


def test_a_revision_of_a_local_model_is_refused(smollm2_gguf: Path) -> None:
    with pytest.raises(ConfigError, match="revision='v2': is for hub ids"):
        LLM(str(smollm2_gguf), revision="v2")


def test_the_tokenizer_may_come_from_elsewhere(smollm2_gguf: Path, minilm_dir: Path) -> None:
    with LLM(str(smollm2_gguf), tokenizer=str(minilm_dir), max_model_len=64, max_num_seqs=1) as llm:
        assert llm.tokenizer.vocab_size == 30522
        assert llm.generate("hello", GREEDY)[0].prompt_token_ids == [101, 7592, 102]
    with pytest.raises(ModelError, match=r"tokenizer='./absent/deep'"):
        LLM(str(smollm2_gguf), tokenizer="./absent/deep")
