"""Rows as POST requests, many at a time; what may pass is tried again."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from datetime import timezone
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import time
from typing import TYPE_CHECKING, Any, cast

import msgspec

from headway.batch.config import HttpRequestProcessorConfig
from headway.batch.flow import Fail
from headway.batch.row import Row, RowError
from headway.batch.stages.concurrent import ConcurrentStage, Entry
from headway.errors import MissingDependencyError, RequestError

if TYPE_CHECKING:
    import aiohttp

IN_FLIGHT = 64
"""Requests at a time, unless http_request_stage.concurrency says another number."""
MAX_BACK_OFF_S = 60.0
"""Waits grow no further; of a server's Retry-After all is waited for."""
_SHOWN = 300
_PART = {"content", "filename", "content_type"}


class HttpStage(ConcurrentStage):
    """payload, a dict, goes out as JSON; http_response, parsed JSON, comes back.

    With a value that is bytes or {"content", "filename", "content_type"} it goes out as multipart/form-data. Retried
    are 408, 429, 5xx, timeouts and lost connections, not before Retry-After. What is left after that, and any other
    answer that is not a 2xx with JSON, is the row's error.
    """

    name = "http_request"

    def __init__(self, config: HttpRequestProcessorConfig) -> None:
        most = config.http_request.concurrency or IN_FLIGHT
        super().__init__(most if isinstance(most, int) else most[1])
        self._config = config
        self._turn = 0.0  # when the next request may go out, in the loop's time
        self._session: aiohttp.ClientSession | None = None

    async def open(self, fail: Fail) -> None:
        try:
            import aiohttp
        except ImportError as error:
            message = 'HTTP requests need the package aiohttp: pip install "headway[http]"'
            raise MissingDependencyError(message) from error
        await super().open(fail)
        self._lost = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.TimeoutError)
        if self._config.session_factory is not None:
            self._session = self._config.session_factory()
        else:
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))  # the limit is ours

    async def close(self) -> None:
        await super().close()
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _answer(self, entries: list[Entry]) -> None:
        ((row, _),) = entries
        config = self._config
        wait = config.base_retry_wait_time_in_s
        for attempt in range(config.max_retries + 1):
            await self._wait_for_turn()
            row.error = None
            pause = await self._attempt(row)
            if pause is None or attempt == config.max_retries:
                break
            await asyncio.sleep(max(pause, wait * random.uniform(0.75, 1.25)))
            wait = max(wait, min(2 * wait, MAX_BACK_OFF_S))
        self._leave(entries)

    async def _wait_for_turn(self) -> None:
        """Evenly spread, and never more than qps: also of retries."""
        if self._config.qps is None:
            return
        now = asyncio.get_running_loop().time()
        turn = max(now, self._turn)
        self._turn = turn + 1 / self._config.qps
        await asyncio.sleep(turn - now)

    async def _attempt(self, row: Row) -> float | None:
        """Answers or fails the row. Seconds after which, at the earliest, to try again; None: that would not help."""
        assert self._session
        try:
            body, headers = self._request(row.data.get("payload"))
            async with self._session.post(self._config.url, data=body, headers=headers) as response:
                text = await response.text(errors="replace")
        except self._lost as error:
            row.fail(error, self.name)
            return 0.0
        except Exception as error:
            row.fail(error, self.name)
            return None
        if response.status // 100 == 2:
            try:
                row.data["http_response"] = json.loads(text)
                return None
            except (ValueError, RecursionError):
                what = "the answer is not JSON"
        else:
            what = response.reason or ""
        row.error = RowError("HttpError", f"{response.status} {what}: {text[:_SHOWN]}".rstrip(": "), self.name)
        return _seconds(response.headers.get("Retry-After")) if _may_pass(response.status) else None

    def _request(self, payload: Any) -> tuple[Any, dict[str, str]]:
        """A form can be sent once, so each attempt gets its own."""
        if not isinstance(payload, Mapping):
            raise RequestError("payload", payload, "must be a dict")
        fields = cast("Mapping[str, Any]", payload)
        headers = self._config.headers or {}
        if any(_is_part(value) for value in fields.values()):  # the content type has to name the form's boundary
            return _form(fields), {name: value for name, value in headers.items() if name.lower() != "content-type"}
        return _json(fields), {"Content-Type": "application/json", **headers}


def _is_part(value: Any) -> bool:
    if isinstance(value, dict):
        return "content" in value and _PART.issuperset(cast("dict[str, Any]", value))
    return isinstance(value, (bytes, bytearray))


def _form(fields: Mapping[str, Any]) -> aiohttp.FormData:
    import aiohttp

    form = aiohttp.FormData()
    for name, value in fields.items():
        if not _is_part(value):
            form.add_field(name, value if isinstance(value, str) else _json(value).decode())
            continue
        part = value if isinstance(value, dict) else {"content": value}
        filename = part.get("filename") or name  # null where Arrow has been
        form.add_field(name, part["content"], filename=filename, content_type=part.get("content_type"))
    return form


def _json(value: Any) -> bytes:
    return msgspec.json.encode(value, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """numpy's arrays and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise RequestError("payload", value, "must be JSON")


def _may_pass(status: int) -> bool:
    return status >= 500 or status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS)


def _seconds(retry_after: str | None) -> float:
    """The header is a number of seconds or a date."""
    if retry_after is None:
        return 0.0
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        when = parsedate_to_datetime(retry_after)
    except ValueError:
        return 0.0
    return max(0.0, when.replace(tzinfo=when.tzinfo or timezone.utc).timestamp() - time())
