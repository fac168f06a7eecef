"""OpenAI's batch files: request lines as rows, and rows as result lines.

Each line is {"custom_id", "method": "POST", "url", "body"}. Parameters of a body that OpenAI does not have but
SamplingParams does, such as top_k, are accepted; anything else that would change the answer is an error of that row.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from headway.batch.readers import InputRow, Reader
from headway.batch.row import Row
from headway.batch.sinks import JsonLinesSink, Record
from headway.errors import RequestError
from headway.messages import Logprob, SamplingParams

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TASKS = {CHAT: "generate", COMPLETIONS: "generate", EMBEDDINGS: "embed"}
LABELS = ("model", "user", "metadata")
"""Of a body: nothing depends on them."""
SAMPLING = frozenset(SamplingParams.__struct_fields__) - {"logprobs", "prompt_logprobs", "structured"}
ONLY = {"stream": False, "echo": False, "best_of": 1, "encoding_format": "float", "tool_choice": "auto", "store": False}
"""Fields of which one value is what happens anyway."""

Body = Mapping[str, Any]


class RequestReader:
    """The requests that another reader's rows are. task: the engine's. models: names that it answers to."""

    types = None

    def __init__(self, lines: Reader, task: str, models: Collection[str]) -> None:
        self._lines, self._task, self._models = lines, task, models
        self.waits, self.once = lines.waits, lines.once

    def __iter__(self) -> Iterator[InputRow]:
        for row in self._lines:
            if row.error is None:
                try:
                    row.data = self._columns(row.source)
                except RequestError as error:
                    row.fail(error, "read")
            yield row

    def count(self) -> int | None:
        return self._lines.count()

    def _columns(self, line: Record) -> Record:
        for field, kind in (("custom_id", str), ("url", str), ("body", dict)):
            if not isinstance(line.get(field), kind):
                accepted = "must be an object" if kind is dict else "must be a string"
                raise RequestError(field, line.get(field), accepted)
        if line.get("method", "POST") != "POST":
            raise RequestError("method", line["method"], "must be POST")
        url, body = line["url"], cast(Body, line["body"])
        if TASKS.get(url) != self._task:
            known = ", ".join(known for known, task in TASKS.items() if task == self._task)
            raise RequestError("url", url, f"must be {known or 'of another job'}: this job's task is {self._task}")
        if body.get("model") not in self._models:
            raise RequestError("body.model", body.get("model"), f"must be {' or '.join(sorted(self._models))}")
        return columns_of(url, body)


def columns_of(url: str, body: Body) -> Record:
    """What a row brings for such a request; its model is not looked at. Raises RequestError."""
    return (_embedding if url == EMBEDDINGS else _generation)(url, body)


def _embedding(url: str, body: Body) -> Record:
    pooling: Record = {}
    for name, value in _given(body, "input"):
        if name != "dimensions":
            raise _unsupported(name, value)
        pooling["dimensions"] = value
    return {**_prompt("input", body.get("input")), "pooling_params": pooling}


def _generation(url: str, body: Body) -> Record:
    chat = url == CHAT
    question = "messages" if chat else "prompt"
    columns: Record = {"messages": body.get("messages")} if chat else _prompt("prompt", body.get("prompt"))
    params: Record = {}
    for name, value in _given(body, question):
        if name in SAMPLING:
            params[name] = value
        elif name == "logprobs" and (value is False or not chat):
            params["logprobs"] = None if value is False else value
        elif name == "logprobs":
            params["logprobs"] = body.get("top_logprobs") or 0
        elif name == "max_completion_tokens" and chat:
            params["max_tokens"] = value
        elif name == "response_format" and chat:
            params["structured"] = _structure(value)
        elif name == "tools" and chat:
            columns["tools"] = value
        elif name != "top_logprobs" or not chat:
            raise _unsupported(name, value)
    return {**columns, "sampling_params": params}


def _given(body: Body, question: str) -> Iterator[tuple[str, Any]]:
    """What is left to look at."""
    for name, value in body.items():
        if value is None or name == question or name in LABELS or (name in ONLY and value == ONLY[name]):
            continue
        if name in ONLY:
            raise RequestError(f"body.{name}", value, f"must be {ONLY[name]!r}")
        yield name, value


def _unsupported(name: str, value: Any) -> RequestError:
    return RequestError(f"body.{name}", value, "is not supported")


def _prompt(name: str, value: Any) -> Record:
    if isinstance(value, str):
        return {"prompt": value}
    if isinstance(value, list) and all(type(one) is int for one in cast("list[Any]", value)):
        return {"tokenized_prompt": value}
    raise RequestError(f"body.{name}", value, "must be one text, or a list of token ids")


def _structure(given: Any) -> Record | None:
    kind = cast(Record, given).get("type") if isinstance(given, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json": {}}
    schema = given.get("json_schema") if kind == "json_schema" else None
    if not isinstance(schema, dict) or "schema" not in schema:
        raise RequestError("body.response_format", given, "must be text, json_object, or json_schema with a schema")
    return {"json": cast(Record, schema)["schema"]}


class ResultSink(JsonLinesSink):
    """Rows of a RequestReader as result lines; of other rows the place is the custom_id."""

    def record(self, row: Row) -> Record:
        name = f"batch_req_{row.index}"
        line: Record = {"id": name, "custom_id": row.source.get("custom_id", str(row.index))}
        if row.error is not None:
            return {**line, "response": None, "error": {"code": row.error.type, "message": row.error.message}}
        return {**line, "response": {"status_code": 200, "request_id": name, "body": answer_body(row)}, "error": None}


@dataclass(frozen=True, slots=True)
class _Kind:
    prefix: str
    object: str


_KINDS = {CHAT: _Kind("chatcmpl", "chat.completion"), COMPLETIONS: _Kind("cmpl", "text_completion")}


def answer_body(row: Row) -> Record:
    """OpenAI's response to the request in ``row.source``, its url and body."""
    data, model = row.data, row.source.get("body", {}).get("model")
    prompt = data["num_input_tokens"]
    if "embeddings" in data:
        items = [{"object": "embedding", "index": 0, "embedding": data["embeddings"]}]
        usage = {"prompt_tokens": prompt, "total_tokens": prompt}
        return {"object": "list", "data": items, "model": model, "usage": usage}
    url = row.source.get("url", CHAT)
    samples = data.get("outputs") or [data]
    generated = sum(sample["num_generated_tokens"] for sample in samples)
    return {
        "id": f"{_KINDS[url].prefix}-{row.index}",
        "object": _KINDS[url].object,
        "created": int(time.time()),
        "model": model,
        "choices": [(_message if url == CHAT else _text)(i, sample) for i, sample in enumerate(samples)],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": data.get("num_cached_tokens", 0)},
        },
    }


def _message(index: int, sample: Record) -> Record:
    calls = {"tool_calls": sample["tool_calls"]} if "tool_calls" in sample else {}
    message = {"role": "assistant", "content": sample["generated_text"], **calls}
    logprobs = None
    if "logprobs" in sample:
        logprobs = {"content": [_token(*chosen) for chosen in _chosen(sample)]}
    return {"index": index, "message": message, "finish_reason": sample["finish_reason"], "logprobs": logprobs}


def _text(index: int, sample: Record) -> Record:
    logprobs = None
    if "logprobs" in sample:
        tokens = _chosen(sample)
        logprobs = {
            "tokens": [token.decoded_token for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": [{one.decoded_token: one.logprob for one in all_} for _, all_ in tokens],
        }
    text, reason = sample["generated_text"], sample["finish_reason"]
    return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}


def _chosen(sample: Record) -> list[tuple[Logprob, list[Logprob]]]:
    """Each token of the answer, and the candidates that are known."""
    candidates = cast("list[dict[int, Logprob]]", sample["logprobs"])
    return [(known[token], list(known.values())) for token, known in zip(sample["generated_tokens"], candidates)]


def _token(chosen: Logprob, candidates: list[Logprob]) -> Record:
    return {**_candidate(chosen), "top_logprobs": [_candidate(one) for one in candidates]}


def _candidate(one: Logprob) -> Record:
    return {"token": one.decoded_token, "logprob": one.logprob, "bytes": list(one.decoded_token.encode())}
