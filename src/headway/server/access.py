"""Who may call: bearer tokens, and pages of other origins."""

from __future__ import annotations

import hmac
import os
from http import HTTPStatus
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from headway.server.endpoint import Reply
from headway.server.errors import ApiError
from headway.server.options import ServeOptions

OPEN = frozenset({"/", "/health", "/ping", "/version", "/metrics", "/docs", "/openapi.json"})
"""Paths that need no token: they tell nothing of anybody's requests."""


def middleware(options: ServeOptions) -> list[Middleware]:
    """The outermost first."""
    layers: list[Middleware] = []
    if options.allowed_origins is not None:
        origins: Any = [origin.strip() for origin in options.allowed_origins.split(",")]
        layers.append(Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"]))
    key = options.api_key or os.environ.get("HEADWAY_API_KEY")
    if key:
        layers.append(Middleware(_Token, key=key))
    return layers


class _Token:
    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path in OPEN or self._is_known(scope["headers"]):
            await self._app(scope, receive, send)
        else:
            headers = {"www-authenticate": "Bearer"}
            await Reply(send).fail(ApiError(HTTPStatus.UNAUTHORIZED, "wrong or missing API key", headers=headers))

    def _is_known(self, headers: list[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._wanted)
