"""The whole way on the real models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway import LLM, AsyncLLM, SamplingParams, StructuredOutput
from headway.errors import ConfigError, ModelError, RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SMALL = {"kv_cache_memory_bytes": 100_000_000}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2-135m-instruct", **SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def minilm() -> Iterator[LLM]:
    with LLM("all-minilm-l6-v2") as llm:
        yield llm


def test_it_knows_the_capital_of_france(llm: LLM) -> None:
    (output,) = llm.generate(["The capital of France is"], GREEDY)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "length"
    assert output.usage == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13, "cached_tokens": 0}


def test_chat_answers_and_ends_by_itself(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=100)
    (output,) = llm.chat([{"role": "user", "content": "What is the capital of France? One sentence."}], params)
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert "<|im_end|>" not in output.outputs[0].text


def test_structured_output_parses(llm: LLM) -> None:
    params = SamplingParams(temperature=0.8, seed=1, n=4, max_tokens=120, structured=StructuredOutput(json=PERSON))
    (output,) = llm.chat([{"role": "user", "content": "Describe a person as JSON with name and age."}], params)
    for completion in output.outputs:
        assert completion.finish_reason == "stop"
        assert set(json.loads(completion.text)) == {"name", "age"}


def test_bad_words_do_not_appear(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, bad_words=["Paris"])
    (output,) = llm.generate("The capital of France is", params)
    assert "Paris" not in output.outputs[0].text


def test_seeded_samples_repeat_whatever_else_runs(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=24)
    (alone,) = llm.generate("Once upon a time", params)
    among = llm.generate(["Hello", "Once upon a time", "def f(x):"], [SamplingParams(max_tokens=9), params, GREEDY])
    assert among[1].outputs[0].token_ids == alone.outputs[0].token_ids


def test_logprobs_are_of_the_tokens_in_the_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=0)
    (output,) = llm.generate("The capital of France is", params)
    (completion,) = output.outputs
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    assert "".join(row[t].decoded_token for row, t in zip(completion.logprobs, completion.token_ids)) == completion.text
    assert all(row[t].rank == 1 for row, t in zip(completion.logprobs, completion.token_ids))
    assert [list(row or ()) for row in output.prompt_logprobs] == [[], *([t] for t in output.prompt_token_ids[1:])]


async def test_streams_join_to_the_whole_text(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    prompts = ["The capital of France is", "日本の首都は", "Once upon a time"]
    expected = [o.outputs[0].text for o in llm.generate(prompts, params)]

    async with AsyncLLM("smollm2-135m-instruct", **SMALL) as engine:

        async def text(prompt: str) -> str:
            return "".join([d.outputs[0].text async for d in engine.generate(prompt, params)])

        assert await asyncio.gather(*(text(p) for p in prompts)) == expected


def test_similar_sentences_score_higher(minilm: LLM) -> None:
    query = "How do I bake bread?"
    near, far = minilm.score(query, ["A recipe for a loaf of bread", "The stock market fell on Tuesday"])
    assert near.data[0] > far.data[0] + 0.3


def test_embeddings_equal_transformers(minilm: LLM, minilm_dir: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["How do I bake bread?", "A longer sentence, with ünïcödé in it.", "x"]
    tokenizer, model = AutoTokenizer.from_pretrained(minilm_dir), AutoModel.from_pretrained(minilm_dir)
    for text, output in zip(texts, minilm.embed(texts), strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt", padding=False)).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        assert float(expected @ torch.tensor(output.data)) >= 0.9999


def test_a_model_that_does_not_exist_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="smollm2"):
        LLM("smollm2-135m-instructt")


def test_an_unknown_setting_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        LLM("smollm2-135m-instruct", max_modl_len=5)


def test_an_encoder_refuses_to_generate(minilm: LLM) -> None:
    with pytest.raises(RequestError, match="cannot generate"):
        minilm.generate("hi")
