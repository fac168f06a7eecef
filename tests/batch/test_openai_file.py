"""OpenAI's batch files, on the real demo models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headway.batch.openai_file import RequestReader
from headway.batch.readers import open_reader
from headway.cli import main

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ENGINE = ["--kv-cache-memory-bytes", "200000000", "--max-model-len", "512", "--max-tokens", "3"]
HELLO = [{"role": "user", "content": "Say hello."}]


def request(url: str, body: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": url, "body": {"model": "m", **body}, **fields}


def column(row: dict[str, Any], task: str = "generate") -> dict[str, Any]:
    (read,) = RequestReader(open_reader([row]), task, ["m", "n"])
    return read.data if read.error is None else {"error": read.error.message}


def test_a_chat_request_is_messages_and_sampling_params() -> None:
    body = {
        "messages": HELLO,
        "max_completion_tokens": 5,
        "stop": ["a"],
        "top_k": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}},
        "tools": [{"type": "function"}],
        "user": "u",
        "stream": False,
        "seed": None,
    }
    params = {"max_tokens": 5, "stop": ["a"], "top_k": 3, "logprobs": 2, "structured": {"json": {"type": "object"}}}
    expected = {"messages": HELLO, "sampling_params": params, "tools": [{"type": "function"}]}
    assert column(request(CHAT, body)) == expected


def test_other_requests_are_prompts() -> None:
    assert column(request(TEXT, {"prompt": "p", "logprobs": 1, "best_of": 1})) == {
        "prompt": "p",
        "sampling_params": {"logprobs": 1},
    }
    assert column(request(TEXT, {"prompt": [1, 2]})) == {"tokenized_prompt": [1, 2], "sampling_params": {}}
    embedding = column(request(EMBED, {"input": "i", "dimensions": 8, "encoding_format": "float"}), "embed")
    assert embedding == {"prompt": "i", "pooling_params": {"dimensions": 8}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"url": CHAT, "body": {}}, "custom_id=None: must be a string"),
        ({"custom_id": "c", "url": CHAT, "body": "b"}, "body='b': must be an object"),
        (request(CHAT, {}, method="GET"), "method='GET': must be POST"),
        (request("/v1/images", {}), "must be /v1/chat/completions, /v1/completions: this job's task is generate"),
        (request(EMBED, {"input": "i"}), "must be /v1/chat/completions, /v1/completions: this job's task is generate"),
        (request(CHAT, {"model": "o", "messages": HELLO}), "body.model='o': must be m or n"),
        (request(CHAT, {"messages": HELLO, "stream": True}), "body.stream=True: must be False"),
        (request(CHAT, {"messages": HELLO, "audio": {}}), "body.audio={}: is not supported"),
        (request(TEXT, {"prompt": "p", "suffix": "s"}), "body.suffix='s': is not supported"),
        (request(TEXT, {"prompt": ["a", "b"]}), "body.prompt='2 prompts': must be at most 1"),
        (request(CHAT, {"messages": HELLO, "response_format": {"type": "xml"}}), "must be text, json_object"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_of_the_row(row: dict[str, Any], message: str) -> None:
    assert message in column(row)["error"]


def results(tmp_path: Path, requests: list[dict[str, Any]], *options: str) -> list[dict[str, Any]]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in requests))
    words = ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--input-format", "openai"]
    main([*words, *options])
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_results_are_lines_as_openai_writes_them(tmp_path: Path) -> None:
    requests = [
        request(CHAT, {"messages": HELLO, "n": 2, "logprobs": True, "top_logprobs": 2}, custom_id="chat"),
        request(TEXT, {"prompt": "The capital of France is", "logprobs": 1}, custom_id="text"),
        request(CHAT, {"messages": 5}, custom_id="bad"),
    ]
    chat, text, bad = results(
        tmp_path, requests, "--model", "smollm2-135m-instruct", "--served-model-name", "m", *ENGINE
    )
    assert [line["custom_id"] for line in (chat, text, bad)] == ["chat", "text", "bad"]
    assert (chat["error"], chat["response"]["status_code"]) == (None, 200)
    body = chat["response"]["body"]
    assert (body["object"], body["model"], len(body["choices"])) == ("chat.completion", "m", 2)
    choice = body["choices"][1]
    assert choice["message"]["role"] == "assistant"
    assert (choice["index"], choice["finish_reason"]) == (1, "length")
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert {*tokens[0]} == {"token", "logprob", "bytes", "top_logprobs"}
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 6
    answer = text["response"]["body"]
    assert answer["object"] == "text_completion"
    assert "Paris" in answer["choices"][0]["text"]
    assert "".join(answer["choices"][0]["logprobs"]["tokens"]) == answer["choices"][0]["text"]
    assert (bad["response"], bad["error"]["code"]) == (None, "RequestError")


def test_embeddings_are_results_too(tmp_path: Path) -> None:
    model = ["--model", "all-minilm-l6-v2", "--served-model-name", "m", "--task", "embed"]
    (line,) = results(tmp_path, [request(EMBED, {"input": "hello", "dimensions": 8})], *model)
    body = line["response"]["body"]
    assert (body["object"], len(body["data"][0]["embedding"])) == ("list", 8)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == 3
