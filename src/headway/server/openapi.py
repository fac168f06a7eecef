"""What the server says of itself: an OpenAPI document made of the request types, and a page that shows it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

import msgspec

from headway import __version__
from headway.server.state import State

Posts = Mapping[str, tuple[type[Any], Callable[[State, Any], Awaitable[Any]]]]
"""Of a path: the body's type, and what answers."""

GETS = {
    "/v1/models": "The models that requests may name.",
    "/health": "200 while requests are taken; tells which replicas run.",
    "/ping": "As /health.",
    "/version": "headway's version.",
    "/metrics": "Prometheus metrics.",
}
_PAGES = resources.files("headway.server").joinpath("pages")
DOCS, PAGE = (_PAGES.joinpath(name).read_bytes() for name in ("docs.html", "index.html"))

_JSON = "application/json"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_REPLICA = {
    "name": "X-data-parallel-rank",
    "in": "header",
    "description": "The replica that is to run the request.",
    "schema": {"type": "integer", "minimum": 0},
}
_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_STATUS = {
    "400": "A field cannot be honoured; param names it.",
    "401": "No API key, or a wrong one.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "As many requests wait as may; Retry-After says when to come again.",
    "503": "The server ends, or an engine has failed and starts again; Retry-After says when to come again.",
}


def document(posts: Posts) -> dict[str, Any]:
    kinds = [kind for kind, _ in posts.values()]
    bodies, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"get": {"summary": text, "responses": _ok(text)}} for path, text in GETS.items()}
    about = _ok("A model that requests may name.") | {"404": _failures()["404"]}
    paths["/v1/models/{model}"] = {"get": {"summary": "One of them.", "parameters": [_MODEL], "responses": about}}
    for (path, (kind, _)), body in zip(posts.items(), bodies):
        paths[path] = {
            "post": {
                "summary": (kind.__doc__ or path).strip().partition("\n")[0],
                "parameters": [_REPLICA],
                "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
                "responses": {**_answers("stream" in kind.__struct_fields__), **_failures()},
            }
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "headway", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _ok(text: str) -> dict[str, Any]:
    return {"200": {"description": text}}


def _answers(streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {_JSON: {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"200": {"description": "The answer.", "content": content}}


def _failures() -> dict[str, Any]:
    content = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in _STATUS.items()}
