"""From prompts and parameters to requests."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from headway.config import CacheConfig, EngineConfig, ModelConfig, ModelFacts
from headway.engine.structured import make_grammar
from headway.errors import RequestError
from headway.llm.processor import TOKENIZE_BATCH, Params, Prepared, Processor
from headway.llm.prompts import Prompt, PromptInput, as_prompts
from headway.messages import PoolingParams, SamplingParams, StructuredOutput
from headway.tokenizers import Tokenizer

FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    kind="decoder",
    max_positions=64,
    dtype="bfloat16",
    vocab_size=49152,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_size=16,
)


def make_processor(tokenizer: Tokenizer, facts: ModelFacts = FACTS, seed: int = 0) -> Processor:
    runner = "generate" if facts.kind == "decoder" else "pooling"
    model = ModelConfig(path="", served_model_name="", max_model_len=facts.max_positions, runner=runner, seed=seed)
    config = EngineConfig(model=model, cache=CacheConfig(num_blocks=1000))
    return Processor(tokenizer, facts, config, make_grammar(tokenizer, facts))


@pytest.fixture
def processor(tokenizer: Tokenizer) -> Processor:
    return make_processor(tokenizer)


def prepare(processor: Processor, prompt: Prompt, **params: Any) -> Prepared:
    return processor.prepare("r", prompt, SamplingParams(**params))


@pytest.mark.parametrize(
    "prompt",
    ["hello there", {"prompt": "hello there"}, PromptInput(text="hello there"), None, {"prompt_token_ids": None}],
)
def test_every_form_of_prompt_gives_the_same_tokens(processor: Processor, tokenizer: Tokenizer, prompt: Any) -> None:
    ids = tokenizer.encode("hello there")
    prompt = ids if prompt is None else prompt
    prompt = {"prompt_token_ids": ids} if prompt == {"prompt_token_ids": None} else prompt
    (request,) = prepare(processor, prompt).requests
    assert request.prompt_token_ids == ids


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ({"text": "x"}, "prompt="),
        ({"prompt": "x", "prompt_token_ids": [1]}, "prompt="),
        ({"prompt": 3}, "prompt=3"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids="),
        ([1, "a"], "prompt_token_ids="),
        ([1, True], "prompt_token_ids="),
        (3, "prompt=3"),
        ("", "prompt has 0 tokens"),
        ([], "prompt has 0 tokens"),
        ([49152], "token ids of this model are 0 to 49151"),
        ([-1], "token ids of this model are 0 to 49151"),
    ],
)
def test_a_bad_prompt_is_refused_by_name(processor: Processor, prompt: Any, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        prepare(processor, prompt)


def test_a_prompt_over_the_limit_says_its_length_and_the_limit(processor: Processor) -> None:
    with pytest.raises(RequestError, match="prompt has 65 tokens; max_model_len is 64"):
        prepare(processor, [5] * 65)
    with pytest.raises(RequestError, match="prompt has 64 tokens; max_model_len is 64, of which 1 must be left"):
        prepare(processor, [5] * 64)
    assert prepare(processor, [5] * 63).requests[0].max_tokens == 1


@pytest.mark.parametrize(("asked", "given"), [(None, 60), (7, 7), (1000, 60)])
def test_max_tokens_is_cut_to_what_fits(processor: Processor, asked: int | None, given: int) -> None:
    assert prepare(processor, [5] * 4, max_tokens=asked).requests[0].max_tokens == given


def test_n_samples_are_requests_with_seeds_of_their_own(processor: Processor) -> None:
    requests = prepare(processor, "hi", n=3, seed=(1 << 64) - 1).requests
    assert [r.request_id for r in requests] == ["r/0", "r/1", "r/2"]
    assert [r.seed for r in requests] == [(1 << 64) - 1, 0, 1]
    assert prepare(processor, "hi").requests[0].request_id == "r"


def test_seeds_are_drawn_from_the_engines_seed(tokenizer: Tokenizer) -> None:
    def draw(seed: int) -> list[int]:
        processor = make_processor(tokenizer, seed=seed)
        return [prepare(processor, "hi").requests[0].seed for _ in range(3)]

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3


def test_end_of_sequence_stops_unless_ignored(processor: Processor) -> None:
    assert prepare(processor, "hi", stop_token_ids=[9, 2]).requests[0].stop_token_ids == [2, 9]
    assert prepare(processor, "hi", stop_token_ids=[9], ignore_eos=True).requests[0].stop_token_ids == [9]


def test_bad_words_are_banned_with_and_without_a_leading_space(processor: Processor, tokenizer: Tokenizer) -> None:
    banned = prepare(processor, "hi", bad_words=["Paris"]).requests[0].bad_words_ids
    assert banned == [tokenizer.encode("Paris"), tokenizer.encode(" Paris")]


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(stop_token_ids=[49152]), "stop_token_ids"),
        (SamplingParams(logit_bias={50000: 1.0}), "logit_bias"),
        (SamplingParams(logprobs=50000), "logprobs"),
        (SamplingParams(prompt_logprobs=50000), "prompt_logprobs"),
        (SamplingParams(bad_words=[" "]), "bad_words"),
        (SamplingParams(structured=StructuredOutput(regex="(")), r"structured\.regex"),
        (PoolingParams(task="classify"), "task='classify'"),
        (PoolingParams(task="score"), "task='score'"),
        (PoolingParams(dimensions=17), "dimensions=17.* at most 16"),
    ],
)
def test_parameters_the_model_cannot_honour_are_refused(processor: Processor, params: Params, field: str) -> None:
    with pytest.raises(RequestError, match=field):
        processor.prepare("r", "hi", params)


def test_an_encoder_does_not_generate(tokenizer: Tokenizer) -> None:
    facts = replace(FACTS, kind="encoder", num_kv_heads=0)
    with pytest.raises(RequestError, match="embeds and classifies"):
        prepare(make_processor(tokenizer, facts), "hi")


def test_only_what_needs_text_streams_from_the_engine(processor: Processor) -> None:
    assert not prepare(processor, "hi").requests[0].stream
    assert prepare(processor, "hi", stop="x").requests[0].stream
    assert processor.prepare("r", "hi", SamplingParams(), delta=True).requests[0].stream


def test_many_prompts_are_prepared_as_one_by_one(processor: Processor, tokenizer: Tokenizer) -> None:
    texts = [f"prompt number {i}" for i in range(TOKENIZE_BATCH + 3)]
    params = SamplingParams(seed=1)
    prepared = processor.prepare_all(map(str, itertools.count()), texts, [params] * len(texts))
    ids = [(p.request_id, p.prompt, p.requests[0].prompt_token_ids) for p in prepared]
    assert ids == [(str(i), text, tokenizer.encode(text)) for i, text in enumerate(texts)]


def test_an_error_names_the_place_of_its_prompt(processor: Processor) -> None:
    with pytest.raises(RequestError, match=r"prompts\[1\]\.prompt=.*prompt has 99 tokens"):
        list(processor.prepare_all(map(str, itertools.count()), ["a", [5] * 99], [SamplingParams()] * 2))


@pytest.mark.parametrize(
    ("given", "many"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]]), ([], []), (("a",), ["a"])],
)
def test_a_list_of_integers_is_one_prompt(given: Any, many: list[Any]) -> None:
    assert as_prompts(given) == many
