"""The endpoints that generate, driven by OpenAI's client."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from time import monotonic, sleep
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from tests.server.conftest import Served

from headway.tokenizers import Tokenizer

MODEL = "smollm2-135m-instruct"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
USAGE: Any = {"include_usage": True}


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    create: Any = client.chat.completions.create
    return create(**{"model": MODEL, "messages": QUESTION, "temperature": 0, **fields})


def complete(client: openai.OpenAI, **fields: Any) -> Any:
    create: Any = client.completions.create
    return create(**{"model": MODEL, "temperature": 0, "max_tokens": 4, **fields})


# Chat -----------------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (37, 8)


def test_a_streamed_chat_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True, stream_options=USAGE))
    *pieces, last = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == ANSWER
    assert [p.choices[0].finish_reason for p in pieces if p.choices[0].finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert not last.choices
    assert last.usage.completion_tokens == 8


def test_a_stream_may_end_with_its_first_token(client: openai.OpenAI) -> None:
    *_, first, last = ask(client, max_tokens=1, stream=True)
    assert first.choices[0].delta.content == "The" and last.choices[0].finish_reason == "length"
    pieces = [chunk.choices[0] for chunk in complete(client, prompt=["One", "Two"], max_tokens=1, stream=True)]
    assert sorted((piece.index, piece.finish_reason) for piece in pieces) == [(0, "length"), (1, "length")]


def test_usage_may_come_with_every_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in ask(client, stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[-1] == 8 and len(counts) > 4


def test_usage_tells_what_the_prefix_cache_had(client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "Count. " * 50}]
    prompt = ask(client, messages=long, max_tokens=1).usage.prompt_tokens
    usage = ask(client, messages=long, max_tokens=1).usage
    assert prompt // 2 < usage.prompt_tokens_details.cached_tokens < prompt
    salted = ask(client, messages=long, max_tokens=1, extra_body={"cache_salt": "s"}).usage
    assert salted.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_several_samples_differ_and_a_seed_repeats_them(client: openai.OpenAI, stream: bool) -> None:
    def texts() -> list[str]:
        said = ask(client, n=3, seed=5, temperature=2, max_tokens=8, stream=stream)
        if not stream:
            assert [choice.index for choice in said.choices] == [0, 1, 2]
            return [choice.message.content for choice in said.choices]
        joined = [""] * 3
        for chunk in said:
            joined[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        return joined

    first = texts()
    assert len(set(first)) == 3 and first == texts()


def test_logprobs_tell_of_each_token_and_its_rivals(client: openai.OpenAI) -> None:
    options: Any = {"logprobs": True, "top_logprobs": 2, "max_tokens": 4}
    content = ask(client, **options).choices[0].logprobs.content
    assert "".join(token.token for token in content) == "The capital of France"
    assert bytes(content[1].bytes) == b" capital"
    for token in content:
        assert [one.logprob for one in token.top_logprobs] == sorted(o.logprob for o in token.top_logprobs)[::-1]
        assert (token.top_logprobs[0].token, len(token.top_logprobs)) == (token.token, 2)
    chunks = [chunk.choices[0] for chunk in ask(client, **options, stream=True)]
    streamed = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content], abs=0.05)


@pytest.mark.parametrize("stop", ["France", ["Spain", "France"]])
def test_stop_strings_end_an_answer(client: openai.OpenAI, stop: Any) -> None:
    (choice,) = ask(client, stop=stop).choices
    assert (choice.message.content, choice.finish_reason, choice.stop_reason) == ("The capital of ", "stop", "France")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, stop=stop, stream=True))
    assert text == "The capital of "


def test_an_answer_may_be_begun(client: openai.OpenAI) -> None:
    begun: Any = [*QUESTION, {"role": "assistant", "content": "The capital of France"}]
    options = {"continue_final_message": True}
    assert ask(client, messages=begun, extra_body=options).choices[0].message.content == " is Paris."


def test_prompt_logprobs_are_told(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert answer.prompt_logprobs[0] is None
    assert len(answer.prompt_logprobs) == answer.usage.prompt_tokens


def test_without_max_tokens_the_context_is_the_limit(client: openai.OpenAI) -> None:
    answer = ask(client, temperature=1, seed=1, extra_body={"ignore_eos": True, "stop": ["\n"], "min_tokens": 30})
    assert answer.usage.completion_tokens > 16


# Structured output ----------------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    text = ask(client, response_format={"type": "json_object"}, max_tokens=64, temperature=1, seed=1)
    content = text.choices[0].message.content
    assert content.startswith("{")
    if text.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(content), dict)


def test_a_schema_holds(client: openai.OpenAI) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    content = ask(client, response_format=wanted).choices[0].message.content
    assert json.loads(content)["a"] in (1, 2)


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"choice": ["Oslo"]}, "Oslo"),
        ({"regex": "a{3}b"}, "aaab"),
        ({"json": {"const": 7}}, "7"),
        ({"grammar": 'start: "x" "y"'}, "xy"),
    ],
)
def test_each_kind_of_constraint_holds(client: openai.OpenAI, constraint: dict[str, Any], said: str) -> None:
    body = {"structured_outputs": constraint}
    assert ask(client, extra_body=body).choices[0].message.content == said
    assert complete(client, prompt="Hi", extra_body=body, max_tokens=16).choices[0].text == said


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_finished_is_an_error(
    client: openai.OpenAI, tokenizer: Tokenizer, stream: bool
) -> None:
    (a,) = tokenizer.encode("a")  # every one of them may be the one that counts: the states double with each
    body = {"structured_outputs": {"regex": "(.*a.{400}){3}"}, "logit_bias": {str(a): 100}}
    with pytest.raises(openai.APIError, match="structured_outputs"):
        list(ask(client, extra_body=body, max_tokens=400, stream=stream))


# Completions ----------------------------------------------------------------------------------------------------------


def test_a_text_is_completed(client: openai.OpenAI) -> None:
    answer = complete(client, prompt="Once upon a time", logprobs=2)
    (choice,) = answer.choices
    assert choice.finish_reason == "length"
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(len(rivals) in (2, 3) for rivals in choice.logprobs.top_logprobs)
    assert len(complete(client, prompt="Once upon", max_tokens=None, logprobs=0).choices[0].logprobs.tokens) == 16


def test_a_streamed_text_says_the_same_with_offsets_that_go_on(client: openai.OpenAI) -> None:
    for echo in (False, True):
        options: dict[str, Any] = {"prompt": "Once upon a time", "logprobs": 1, "echo": echo}
        (whole,) = complete(client, **options).choices
        pieces = [chunk.choices[0] for chunk in complete(client, **options, stream=True)]
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [offset for piece in pieces for offset in piece.logprobs.text_offset] == whole.logprobs.text_offset
        for token, offset in zip(whole.logprobs.tokens, whole.logprobs.text_offset, strict=True):
            assert whole.text[offset:].startswith(token)
        assert whole.logprobs.text_offset[0] == 0


def test_echo_gives_the_prompt_too(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    plain = complete(client, prompt="Once upon a time").choices[0].text
    assert complete(client, prompt="Once upon a time", echo=True).choices[0].text == "Once upon a time" + plain
    ids = tokenizer.encode("Once upon a time")
    assert complete(client, prompt=ids, echo=True).choices[0].text == "Once upon a time" + plain
    pieces = complete(client, prompt=ids, echo=True, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "Once upon a time" + plain


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_be_scored_alone(client: openai.OpenAI, tokenizer: Tokenizer, stream: bool) -> None:
    said = complete(client, prompt="Once upon a time", echo=True, max_tokens=0, logprobs=1, stream=stream)
    (choice,) = next(iter(said)).choices if stream else said.choices
    assert (choice.text, choice.finish_reason) == ("Once upon a time", "length")
    assert len(choice.logprobs.tokens) == len(tokenizer.encode("Once upon a time"))
    assert choice.logprobs.token_logprobs[0] is None
    assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    if not stream:
        assert said.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_what_ends_a_prompt_alone_is_its_length(client: openai.OpenAI, tokenizer: Tokenizer, stream: bool) -> None:
    bias = {str(tokenizer.eos_token_ids[0]): 100}
    said = complete(client, prompt="Once", echo=True, max_tokens=0, logit_bias=bias, stream=stream)
    (choice,) = next(iter(said)).choices if stream else said.choices
    assert (choice.text, choice.finish_reason) == ("Once", "length")


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_are_answered_side_by_side(client: openai.OpenAI, tokenizer: Tokenizer, stream: bool) -> None:
    texts = ["The capital of France is", "One two three", "Once upon a time"]
    alone = [complete(client, prompt=text).choices[0].text for text in texts]
    for prompts in (texts, [tokenizer.encode(text) for text in texts], [texts[0], *map(tokenizer.encode, texts[1:])]):
        said = complete(client, prompt=prompts, n=2, stream=stream)
        joined = [""] * 6
        for choice in [chunk.choices[0] for chunk in said] if stream else said.choices:
            joined[choice.index] += choice.text
        assert joined == [text for text in alone for _ in range(2)]
        if not stream:
            assert [choice.index for choice in said.choices] == [*range(6)]
            assert said.usage.prompt_tokens == sum(len(tokenizer.encode(text)) for text in texts)
            assert said.usage.completion_tokens == 24


def test_usage_of_several_streamed_prompts_is_that_of_all(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    *_, last = complete(client, prompt=["One", "Two three"], n=2, stream=True, stream_options=USAGE)
    assert last.usage.prompt_tokens == len(tokenizer.encode("One")) + len(tokenizer.encode("Two three"))
    assert last.usage.completion_tokens == 16


def test_one_bad_prompt_is_the_requests_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token ids of this model"):
        complete(client, prompt=[[1, 2], [10**6]])


@pytest.mark.parametrize("prompt", [[], [1, "a"], [1, [2]], [[]], [5] * 100_000, ["a"] * 10_000])
def test_a_prompt_that_is_none_is_told(client: openai.OpenAI, prompt: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="prompt") as caught:
        complete(client, prompt=prompt)
    assert (caught.value.param or "").startswith("prompt")


def running(served: Served) -> int:
    with urllib.request.urlopen(f"{served.url}/metrics") as answer:
        metrics = answer.read().decode()
    return sum(int(float(n)) for n in re.findall(r"num_requests_(?:running|waiting){.*} (\S+)", metrics))


@pytest.mark.parametrize("label", ["short", "a" * 300_000], ids=["small body", "large body"])
def test_a_client_that_leaves_ends_all_of_its_prompts(client: openai.OpenAI, served: Served, label: str) -> None:
    endless: Any = {"ignore_eos": True, "user": label}
    stream = complete(client, prompt=["One", "Two"], n=2, max_tokens=4000, stream=True, extra_body=endless)
    next(iter(stream))
    assert running(served)
    stream.close()
    deadline = monotonic() + 30
    while running(served):
        assert monotonic() < deadline
        sleep(0.01)


# Refusals -------------------------------------------------------------------------------------------------------------

NEEDLESS = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("foo", 1),
        ("top_p", "much"),
        ("top_p", 2.0),
        ("n", 0),
        ("n", 100_000),
        ("stream_options", {"sometimes": True}),
        ("guided_json", {}),
        ("priority", 1),
        ("store", True),
        ("top_logprobs", 2),
        ("logit_bias", {"word": 1}),
        ("chat_template", "{{ messages }}"),
        ("tools", [{"type": "function"}]),
        ("tools", [NEEDLESS]),
        ("tool_choice", "required"),
        ("chat_template_kwargs", {"add_generation_prompt": False}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_object", "json_schema": {"schema": {"type": "object"}}}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}),
        ("structured_outputs", {"regex": "("}),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}),
        ("structured_outputs", {"xml": ""}),
        ("logit_bias", {str(token): 1 for token in range(5000)}),
        ("messages", []),
        ("messages", [{"role": "user", "content": "word " * 20_000}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_field_that_cannot_be_honoured_is_named(
    client: openai.OpenAI, field: str, value: object, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=field) as caught:
        ask(client, stream=stream, extra_body={field: value})
    assert (caught.value.param or "").startswith(field)


@pytest.mark.parametrize("field", ["messages", "tools", "chat_template_kwargs", "metadata", "structured_outputs"])
def test_a_body_may_be_nested_however_deeply(served: Served, field: str) -> None:
    for depth in (*range(940, 1000, 6), 100_000):
        nested = '{"json":' * depth + "1" + "}" * depth
        value = {
            "messages": '[{"role": "user", "content": %s}]',
            "tools": '[{"type": "function", "function": {"name": "f", "parameters": %s}}]',
        }.get(field, "%s")
        rest = "" if field == "messages" else ', "messages": [{"role": "user", "content": "Hi"}]'
        body = f'{{"max_tokens": 1, "tool_choice": "none", "{field}": {value % nested}{rest}}}'.encode()
        try:
            with urllib.request.urlopen(f"{served.url}/v1/chat/completions", body) as answer:
                assert answer.status == 200
        except urllib.error.HTTPError as error:
            assert error.code == 400
            error.close()


def test_stream_options_need_a_stream(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="stream_options"):
        ask(client, stream_options=USAGE)


def test_a_model_that_is_not_there_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(model="nobody", messages=QUESTION)


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    (listed,) = client.models.list()
    assert listed.id == MODEL and client.models.retrieve(MODEL) == listed
    with pytest.raises(openai.NotFoundError, match="no/body"):
        client.models.retrieve("no/body")
