"""OpenAI's batch files: request lines as rows, and rows as result lines.

Each line is {"custom_id", "method": "POST", "url", "body"}. Parameters of a body that OpenAI does not have but
SamplingParams does, such as top_k, are accepted; anything else that would change the answer is an error of that row.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

import msgspec

from headway.batch.readers import InputRow, Reader
from headway.batch.row import Row
from headway.batch.sinks import JsonLinesSink, Record
from headway.errors import RequestError
from headway.messages import Completion
from headway.server.answers import Usage, chat_choice, head, text_choice, text_logprobs
from headway.server.pooling import EmbeddingRequest
from headway.server.protocol import ChatRequest, CompletionRequest, Input, field_of, prompts_of
from headway.server.reading import Call, Message

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
TASKS = {CHAT: "generate", COMPLETIONS: "generate", EMBEDDINGS: "embed"}
_Request = ChatRequest | CompletionRequest | EmbeddingRequest
_KINDS: dict[str, type[_Request]] = {CHAT: ChatRequest, COMPLETIONS: CompletionRequest, EMBEDDINGS: EmbeddingRequest}
_FIXED = {
    *("stream", "stream_options", "store", "echo", "prompt_logprobs", "priority", "cache_salt", "encoding_format"),
    *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message"),
    "parallel_tool_calls",
}
"""Fields of which rows have the default."""

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
    request = _request(_KINDS[url], {name: value for name, value in body.items() if value is not None})
    if isinstance(request, EmbeddingRequest):
        params = {name: value for name in ("dimensions", "normalize") if (value := getattr(request, name)) is not None}
        return {**_prompt("input", request.input), "pooling_params": params}
    try:
        params = request.given()
    except RequestError as error:
        raise RequestError(f"body.{error.field}", error.value, error.accepted) from None
    if isinstance(request, CompletionRequest):
        return {**_prompt("prompt", request.prompt), "sampling_params": params}
    if request.tool_choice not in (None, "auto"):
        raise RequestError("body.tool_choice", request.tool_choice, "must be 'auto'")
    tools = {} if request.tools is None else {"tools": request.tools}
    return {"messages": request.messages, "sampling_params": params, **tools}


def _request(kind: type[_Request], body: Body) -> _Request:
    try:
        request = msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        field = field_of(str(error)) or ""
        name = re.split(r"[.\[]", field)[0]
        accepted = "is not supported" if "unknown field" in str(error) else str(error)
        raise RequestError(f"body.{field}", body.get(name), accepted) from None
    for field in msgspec.structs.fields(kind):
        if field.name in _FIXED and (value := getattr(request, field.name)) != field.default:
            raise RequestError(f"body.{field.name}", value, f"must be {field.default!r}")
    return request


def _prompt(name: str, given: Input) -> Record:
    (prompt,) = prompts_of(f"body.{name}", given, most=1)
    text, ids = prompt.text, prompt.token_ids
    return {"tokenized_prompt": ids} if text is None else {"prompt": text}


class ResultSink(JsonLinesSink):
    """Rows of a RequestReader as result lines; of other rows the place is the custom_id."""

    def record(self, row: Row) -> Record:
        name = f"batch_req_{row.index}"
        line: Record = {"id": name, "custom_id": row.source.get("custom_id", str(row.index))}
        if row.error is not None:
            return {**line, "response": None, "error": {"code": row.error.type, "message": row.error.message}}
        return {**line, "response": {"status_code": 200, "request_id": name, "body": answer_body(row)}, "error": None}


_HEADS = {CHAT: ("chatcmpl", "chat.completion"), COMPLETIONS: ("cmpl", "text_completion")}


def answer_body(row: Row) -> Record:
    """OpenAI's response to the request in ``row.source``, its url and body."""
    data, body, url = row.data, row.source.get("body", {}), row.source.get("url", CHAT)
    prompt, model = data["num_input_tokens"], body.get("model")
    if "embeddings" in data:
        items = [{"object": "embedding", "index": 0, "embedding": data["embeddings"]}]
        usage = {"prompt_tokens": prompt, "total_tokens": prompt}
        return {"object": "list", "data": items, "model": model, "usage": usage}
    samples = data.get("outputs") or [data]
    usage = Usage(prompt, sum(one["num_generated_tokens"] for one in samples), data.get("num_cached_tokens", 0))
    prefix, object_ = _HEADS[url]
    return {
        **head(prefix, object_, model),
        "id": f"{prefix}-{row.index}",
        "choices": [_choice(url, i, sample, body.get("top_logprobs") or 0) for i, sample in enumerate(samples)],
        "usage": usage.record(),
    }


def _choice(url: str, index: int, columns: Record, top: int) -> Record:
    sample = Completion(
        index=index,
        text=columns["generated_text"],
        token_ids=columns["generated_tokens"],
        finish_reason=columns["finish_reason"],
        stop_reason=columns.get("stop_reason"),
        logprobs=columns.get("logprobs"),
    )
    if url == COMPLETIONS:
        known = sample.logprobs
        return text_choice(sample, None if known is None else text_logprobs(sample.token_ids, known))
    calls = [Call(call["id"], **call["function"]) for call in columns.get("tool_calls") or ()]
    return chat_choice(sample, Message(content=sample.text, calls=calls), top)
