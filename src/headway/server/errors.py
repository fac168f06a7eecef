"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from http import HTTPStatus

import msgspec

from headway.errors import EngineError, FieldError, MissingDependencyError, RequestError, UserError

RETRY = {"retry-after": "1"}
"""Seconds: when to come again."""


class ApiError(Exception):
    """A request that is answered with an error. param: the field of the request that is to blame."""

    def __init__(
        self,
        status: HTTPStatus,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        return error_body(self.status, str(self), self.param, self.code)


def error_body(status: HTTPStatus, message: str, param: str | None = None, code: str | None = None) -> bytes:
    error = {"message": message, "type": _type(status), "param": param, "code": code}
    return msgspec.json.encode({"error": error})


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. Of our own mistakes it hears no more than that they happened."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, FieldError):
        return ApiError(HTTPStatus.BAD_REQUEST, str(error), param=error.field)
    if isinstance(error, (UserError, MissingDependencyError)):
        return ApiError(HTTPStatus.BAD_REQUEST, str(error))
    if isinstance(error, RecursionError):
        return ApiError(HTTPStatus.BAD_REQUEST, "the body is nested too deeply")
    if isinstance(error, EngineError):
        message = f"the engine has failed: {error}"
        return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code="engine_dead", headers=RETRY)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, f"the server has failed: {type(error).__name__}")


@contextmanager
def named(names: Mapping[str, str]) -> Generator[None]:
    """Fields that are to blame go by the client's names for them, where those are others."""
    try:
        yield
    except RequestError as error:
        name = names.get(re.split(r"[.\[]", error.field)[0])
        if name is None:
            raise
        raise RequestError(name, error.value, error.accepted) from error


_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


def _type(status: HTTPStatus) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error")
