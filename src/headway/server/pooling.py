"""/v1/embeddings, /v1/classify, /v1/score and /v1/rerank: what encoders, and decoders as such, are asked for."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from headway.messages import PooledOutput, PoolingParams
from headway.server.answers import Record, encode, head
from headway.server.errors import named
from headway.server.protocol import Input, prompts_of
from headway.server.state import State

MAX_INPUTS = 2048
"""Of one request, as OpenAI has it."""
Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_INPUTS)]


class Pooled(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """user: a label; nothing depends on it."""

    model: str | None = None
    user: str | None = None


class EmbeddingRequest(Pooled, kw_only=True):
    """input: a text, token ids, or a list of either. dimensions: how many leading ones are kept. normalize: None takes
    what the model declares."""

    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    normalize: bool | None = None


class ClassifyRequest(Pooled, kw_only=True):
    """activation: None takes what the model declares."""

    input: Input
    activation: bool | None = None


class ScoreRequest(Pooled, kw_only=True):
    """One text against many, or as many on both sides."""

    text_1: str | Texts
    text_2: str | Texts


class RerankRequest(Pooled, kw_only=True):
    """top_n: how many of the best come back; None: all."""

    query: str
    documents: Texts
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool = True


async def embeddings(state: State, request: EmbeddingRequest) -> bytes:
    state.check_model(request.model)
    params = PoolingParams(task="embed", normalize=request.normalize, dimensions=request.dimensions)
    outputs = await _pooled(state, request.input, params)
    form = _base64 if request.encoding_format == "base64" else list[float]
    data = [{"object": "embedding", "index": i, "embedding": form(one.data)} for i, one in enumerate(outputs)]
    return encode({"object": "list", "data": data, "model": state.names[0], "usage": _usage(state, outputs)})


async def classify(state: State, request: ClassifyRequest) -> bytes:
    state.check_model(request.model)
    params = PoolingParams(task="classify", activation=request.activation)
    outputs = await _pooled(state, request.input, params)
    data: list[Record] = []
    for i, one in enumerate(outputs):
        best = max(range(len(one.data)), key=one.data.__getitem__)
        data.append({"index": i, "label": f"LABEL_{best}", "probs": one.data, "num_classes": len(one.data)})
    return encode({**head("classify", "list", state.names[0]), "data": data, "usage": _usage(state, outputs)})


async def score(state: State, request: ScoreRequest) -> bytes:
    state.check_model(request.model)
    outputs = await state.llm.score(request.text_1, request.text_2, state.data_parallel_rank)
    data = [{"index": i, "object": "score", "score": one.data[0]} for i, one in enumerate(outputs)]
    return encode({**head("score", "list", state.names[0]), "data": data, "usage": _usage(state, outputs)})


async def rerank(state: State, request: RerankRequest) -> bytes:
    state.check_model(request.model)
    outputs = await state.llm.score(request.query, request.documents, state.data_parallel_rank)
    order = sorted(range(len(outputs)), key=lambda i: -outputs[i].data[0])[: request.top_n]
    results: list[Record] = [{"index": i, "relevance_score": outputs[i].data[0]} for i in order]
    if request.return_documents:
        results = [{**one, "document": {"text": request.documents[one["index"]]}} for one in results]
    return encode({**head("rerank", "list", state.names[0]), "results": results, "usage": _usage(state, outputs)})


async def _pooled(state: State, given: Input, params: PoolingParams) -> list[PooledOutput]:
    with named({"prompt": "input", "prompt_token_ids": "input"}):
        return await state.llm.pool(prompts_of("input", given, MAX_INPUTS), params, state.data_parallel_rank)


def _base64(vector: Sequence[float]) -> str:
    """Little-endian float32, as OpenAI's client decodes it."""
    return base64.b64encode(array("f", vector).tobytes()).decode()


def _usage(state: State, outputs: Sequence[PooledOutput]) -> dict[str, Any]:
    if state.traces is not None:
        state.traces.pooled(outputs)
    tokens = sum(len(one.prompt_token_ids) for one in outputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
