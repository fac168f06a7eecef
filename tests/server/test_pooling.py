"""Embeddings, scores and tokens over HTTP."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.server.conftest import Served

from headway.tokenizers import Tokenizer

CAT, DOG, LOAN = "a cat sat on the mat", "the dog lay on the rug", "interest on the loan is due"


@pytest.fixture(scope="module")
def encoder(minilm_dir: Path) -> Iterator[Served]:
    server = Served(str(minilm_dir), "--threads", "1", "--served-model-name", "minilm")
    yield server
    assert server.end() == 0, server.log


@pytest.fixture(scope="module")
def client(encoder: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{encoder.url}/v1", api_key="none", max_retries=0)


def _post(server: Served, path: str, **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_embeddings_are_the_same_in_both_encodings(client: openai.OpenAI) -> None:
    # The client asks for base64 by itself, and decodes it.
    packed = client.embeddings.create(model="minilm", input=[CAT, LOAN])
    plain = client.embeddings.create(model="minilm", input=[CAT, LOAN], encoding_format="float")
    assert [one.embedding for one in packed.data] == [one.embedding for one in plain.data]
    assert [one.index for one in plain.data] == [0, 1]
    assert math.hypot(*plain.data[0].embedding) == pytest.approx(1)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 10


def test_token_ids_embed_as_their_text_does(client: openai.OpenAI, minilm_tokenizer: Tokenizer) -> None:
    ids = minilm_tokenizer.encode(CAT)
    texts = client.embeddings.create(model="minilm", input=CAT).data[0].embedding
    for given in (ids, [ids]):
        assert client.embeddings.create(model="minilm", input=given).data[0].embedding == texts


def test_dimensions_shorten_an_embedding(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="minilm", input=CAT, dimensions=8).data[0].embedding) == 8
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="minilm", input=CAT, dimensions=10_000)


@pytest.mark.parametrize("given", [[], ["a", 1], [["a"]], [[1], 2], 3, [[]], [10**9]])
def test_an_input_that_is_none_is_refused(encoder: Served, given: object) -> None:
    status, body = _post(encoder, "/v1/embeddings", input=given)
    assert status == 400
    assert body["error"]["param"].startswith("input")


def test_documents_are_ranked(encoder: Served) -> None:
    _, body = _post(encoder, "/v1/rerank", query=CAT, documents=[LOAN, DOG, CAT], top_n=2)
    assert [one["document"]["text"] for one in body["results"]] == [CAT, DOG]
    assert [one["index"] for one in body["results"]] == [2, 1]
    assert body["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [("rerank", "documents", []), ("rerank", "top_n", 0), ("score", "text_2", []), ("score", "text_2", [CAT] * 2049)],
)
def test_what_cannot_be_ranked_or_scored_is_named(encoder: Served, path: str, field: str, value: object) -> None:
    body = {"query": CAT, "documents": [DOG]} if path == "rerank" else {"text_1": CAT, "text_2": DOG}
    status, answer = _post(encoder, f"/v1/{path}", **{**body, field: value})
    assert (status, answer["error"]["param"]) == (400, field), answer


def test_a_text_is_scored_against_many(encoder: Served) -> None:
    _, body = _post(encoder, "/v1/score", text_1=CAT, text_2=[CAT, DOG, LOAN])
    scores = [one["score"] for one in body["data"]]
    assert scores == sorted(scores, reverse=True)


def test_what_a_model_cannot_do_is_the_clients_error(encoder: Served) -> None:
    for path, body in (("/v1/classify", {"input": CAT}), ("/v1/completions", {"prompt": CAT})):
        status, answer = _post(encoder, path, **body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer


def test_tokens_there_and_back(served: Served) -> None:
    _, there = _post(served, "/tokenize", prompt="Hello, world", return_token_strs=True)
    assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
    _, back = _post(served, "/detokenize", tokens=there["tokens"])
    assert back == {"prompt": "Hello, world"}


def test_a_conversation_is_tokenised_as_it_is_answered(served: Served) -> None:
    _, body = _post(served, "/tokenize", messages=[{"role": "user", "content": "What is the capital of France?"}])
    assert body["count"] == 37


def test_tokens_that_are_none_are_refused(served: Served) -> None:
    status, body = _post(served, "/detokenize", tokens=[10**9])
    assert (status, body["error"]["param"]) == (400, "tokens")


def test_the_document_describes_every_endpoint(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/openapi.json") as answer:
        document = json.load(answer)
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = document["components"]["schemas"][chat["$ref"].rpartition("/")[2]]
    assert schema["required"] == ["messages"]
    assert schema["additionalProperties"] is False
    with urllib.request.urlopen(f"{served.url}/docs") as answer:
        assert b"openapi.json" in answer.read()
