"""The routes of the server."""

from __future__ import annotations

from http import HTTPStatus
from time import time

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from headway import __version__
from headway.server.access import middleware
from headway.server.chat import chat
from headway.server.completions import completions
from headway.server.endpoint import Endpoint
from headway.server.errors import ApiError, error_body
from headway.server.metrics import exposition
from headway.server.openapi import DOCS, PAGE, Posts, document
from headway.server.pooling import (
    ClassifyRequest,
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    classify,
    embeddings,
    rerank,
    score,
)
from headway.server.protocol import ChatRequest, CompletionRequest
from headway.server.responses import responses
from headway.server.responses_input import ResponsesRequest
from headway.server.state import State
from headway.server.tokens import DetokenizeRequest, TokenizeRequest, detokenize, tokenize

POSTS: Posts = {
    "/v1/chat/completions": (ChatRequest, chat),
    "/v1/completions": (CompletionRequest, completions),
    "/v1/responses": (ResponsesRequest, responses),
    "/v1/embeddings": (EmbeddingRequest, embeddings),
    "/v1/classify": (ClassifyRequest, classify),
    "/v1/score": (ScoreRequest, score),
    "/v1/rerank": (RerankRequest, rerank),
    "/tokenize": (TokenizeRequest, tokenize),
    "/detokenize": (DetokenizeRequest, detokenize),
}


def make_app(state: State) -> ASGIApp:
    started = int(time())
    endpoints: dict[str, ASGIApp] = {path: Endpoint(state, *post) for path, post in POSTS.items()}

    async def models(_: Request) -> Response:
        return _json({"object": "list", "data": [_model(state, name, started) for name in state.names]})

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        try:
            state.check_model(name)
        except ApiError as error:
            return Response(error.body(), error.status, media_type="application/json")
        return _json(_model(state, name, started))

    async def health(_: Request) -> Response:
        replicas = state.llm.health()
        up = any(replica.up for replica in replicas)
        status = "draining" if state.draining else "up" if up else "down"
        code = HTTPStatus.OK if status == "up" else HTTPStatus.SERVICE_UNAVAILABLE
        return _json({"status": status, "replicas": replicas}, code)

    async def metrics(_: Request) -> Response:
        if state.looks:
            state.board.look(state.llm)
        text = exposition(state.names[0], state.board)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    same: dict[str, ASGIApp] = {
        "/version": _json({"version": __version__}),
        "/openapi.json": _json(document(POSTS)),
        "/docs": Response(DOCS, media_type="text/html"),
        "/": Response(PAGE, media_type="text/html"),
    }
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", model),
        Route("/health", health),
        Route("/ping", health, methods=["GET", "POST"]),
        Route("/metrics", metrics),
        *(Route(path, answer, methods=["GET"]) for path, answer in same.items()),
    ]
    app: ASGIApp = _Shortcut(endpoints, Starlette(routes=routes, exception_handlers={404: _error, 405: _error}))
    if state.options.otlp_traces_endpoint is not None:
        from headway.server.tracing import Traces

        state.traces = Traces(state.options.otlp_traces_endpoint, state.names[0])
        app = state.traces.around(app)
    for layer, args, kwargs in reversed(middleware(state.options)):
        app = layer(app, *args, **kwargs)
    return app


class _Shortcut:
    """The way to endpoints that answer every error themselves, past a tenth of a request's cost; else the routes."""

    def __init__(self, endpoints: dict[str, ASGIApp], routes: ASGIApp) -> None:
        self._endpoints, self._routes = endpoints, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._endpoints.get(scope["path"]) if scope.get("method") == "POST" else None
        await (app or self._routes)(scope, receive, send)


def _model(state: State, name: str, created: int) -> dict[str, object]:
    length = state.llm.config.model.max_model_len
    return {"id": name, "object": "model", "created": created, "owned_by": "headway", "max_model_len": length}


def _json(value: object, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


async def _error(request: Request, error: Exception) -> Response:
    status = HTTPStatus(getattr(error, "status_code", HTTPStatus.INTERNAL_SERVER_ERROR))
    message = f"{request.method} {request.scope['path']}: {status.phrase.lower()}"
    return Response(
        error_body(status, message), status, media_type="application/json", headers=getattr(error, "headers", None)
    )
