"""Rows as HTTP requests, against a server on this machine."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from headway.batch import HttpRequestProcessorConfig, build_processor
from headway.batch.row import Row
from headway.errors import ConfigError, MissingDependencyError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[TestServer]:
    async def handle(request: web.Request) -> web.StreamResponse:
        return await handler(request)

    app = web.Application()
    app.router.add_post("/", handle)
    async with TestServer(app, handler_cancellation=True) as server:
        yield server


async def answer(server: TestServer, payloads: list[Any], **config: Any) -> list[dict[str, Any]]:
    given = [Row.of(i, {"id": i, "payload": payload}) for i, payload in enumerate(payloads)]
    processor = build_processor(HttpRequestProcessorConfig(url=str(server.make_url("/")), **config))
    async with processor.flow() as flow:
        await asyncio.wait_for(flow.answer(given), 30)
    return [row.record() for row in given]


class Meeting:
    """Holds requests until ``size`` of them are there at the same time."""

    def __init__(self, size: int) -> None:
        self.size, self.inside, self.most = size, 0, 0
        self.full = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.Response:
        self.inside += 1
        self.most = max(self.most, self.inside)
        if self.inside == self.size:
            self.full.set()
        await self.full.wait()
        await asyncio.sleep(0)
        self.inside -= 1
        return web.json_response(await request.json())


class Replies:
    """One after the other, the last for ever. times: of the requests, in the loop's time."""

    def __init__(self, *replies: Callable[[web.Request], web.StreamResponse]) -> None:
        self.replies = list(replies)
        self.times: list[float] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.times.append(asyncio.get_running_loop().time())
        await request.read()
        return (self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])(request)

    def gaps(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.times, self.times[1:])]


def ok(request: web.Request) -> web.Response:
    return web.json_response({"ok": True})


def drop(request: web.Request) -> web.Response:
    assert request.transport
    request.transport.abort()
    return web.Response()


def status(number: int, text: str = "", **headers: str) -> Callable[[web.Request], web.Response]:
    return lambda _: web.Response(status=number, text=text, headers=headers)


@pytest.mark.parametrize(("settings", "limit"), [({}, 64), ({"http_request_stage": {"concurrency": 5}}, 5)])
async def test_as_many_requests_as_allowed_run_at_a_time_and_no_more(settings: dict[str, Any], limit: int) -> None:
    meeting = Meeting(limit)
    async with serving(meeting) as server:
        records = await answer(server, [{"n": n} for n in range(3 * limit)], **settings)
    assert [record["http_response"] for record in records] == [{"n": n} for n in range(3 * limit)]
    assert meeting.most == limit


async def test_requests_a_second_are_kept_while_answers_take_long() -> None:
    meeting, loop = Meeting(20), asyncio.get_running_loop()
    started = loop.time()
    async with serving(meeting) as server:
        await answer(server, [{}] * 20, qps=50)
    assert loop.time() - started >= 19 / 50
    assert meeting.most == 20


async def test_retries_count_among_the_requests_a_second() -> None:
    replies, started = Replies(status(503)), asyncio.get_running_loop().time()
    async with serving(replies) as server:
        await answer(server, [{}] * 4, qps=20, max_retries=2, base_retry_wait_time_in_s=0.001)
    assert len(replies.times) == 12
    assert replies.times[-1] - started >= 11 / 20


@pytest.mark.parametrize(
    "passing", [status(408), status(429), status(500), status(503), drop], ids=["408", "429", "500", "503", "drop"]
)
async def test_what_passes_is_tried_again(passing: Callable[[web.Request], web.Response]) -> None:
    replies = Replies(passing, passing, ok)
    async with serving(replies) as server:
        (record,) = await answer(server, [{}], max_retries=2, base_retry_wait_time_in_s=0.05)
    assert record == {"id": 0, "payload": {}, "http_response": {"ok": True}}
    first, second = replies.gaps()
    assert first >= 0.03 and second >= 0.07  # doubled, a quarter more or less


def in_a_second(request: web.Request) -> web.Response:
    when = datetime.now(timezone.utc) + timedelta(seconds=2)  # the header has whole seconds
    return status(429, **{"Retry-After": format_datetime(when, usegmt=True)})(request)


def in_a_second_of_greenwich(request: web.Request) -> web.Response:
    when = datetime.now(timezone.utc) + timedelta(seconds=2)
    return status(503, **{"Retry-After": when.strftime("%a %b %d %H:%M:%S %Y")})(request)


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "JST-9")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_east")
@pytest.mark.parametrize(
    "busy",
    [status(429, **{"Retry-After": "1"}), in_a_second, in_a_second_of_greenwich],
    ids=["seconds", "date", "asctime"],
)
async def test_no_sooner_than_the_server_says(busy: Callable[[web.Request], web.Response]) -> None:
    replies = Replies(busy, ok)
    async with serving(replies) as server:
        (record,) = await answer(server, [{}], max_retries=1, base_retry_wait_time_in_s=0.001)
    assert record["http_response"] == {"ok": True}
    assert replies.gaps()[0] >= 0.99


async def test_an_error_that_stays_is_the_rows() -> None:
    replies = Replies(status(500, "the disk is full " + "x" * 1000))
    async with serving(replies) as server:
        (record,) = await answer(server, [{"n": 1}], max_retries=2, base_retry_wait_time_in_s=0.001)
    assert len(replies.times) == 3
    assert {name: record[name] for name in ("id", "payload")} == {"id": 0, "payload": {"n": 1}}
    assert record["error"]["type"] == "HttpError" and record["error"]["stage"] == "http_request"
    assert record["error"]["message"].startswith("500 Internal Server Error: the disk is full x")
    assert len(record["error"]["message"]) < 400
    assert "http_response" not in record


@pytest.mark.parametrize("number", [400, 401, 404, 422])
async def test_a_mistake_is_not_tried_again(number: int) -> None:
    replies = Replies(status(number, "no such model"))
    async with serving(replies) as server:
        (record,) = await answer(server, [{}], max_retries=5)
    assert len(replies.times) == 1
    assert record["error"]["message"].startswith(f"{number} ")
    assert record["error"]["message"].endswith(": no such model")


async def test_a_connection_that_is_lost_again_and_again_is_the_rows_error() -> None:
    async with serving(Replies(drop)) as server:
        (record,) = await answer(server, [{}], max_retries=1, base_retry_wait_time_in_s=0.001)
    assert record["error"] == {
        "type": "ServerDisconnectedError",
        "message": "Server disconnected",
        "stage": "http_request",
    }


async def test_nobody_listens(unused_tcp_port: int) -> None:
    row = Row.of(0, {"payload": {}})
    async with build_processor(HttpRequestProcessorConfig(url=f"http://127.0.0.1:{unused_tcp_port}")).flow() as flow:
        await asyncio.wait_for(flow.answer([row]), 30)
    assert row.error and row.error.type == "ClientConnectorError"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (status(200, "<html>"), "200 the answer is not JSON: <html>"),
        (status(200, "[" * 100_000), "200 the answer is not JSON: [[["),
        (status(300, "{}"), "300 Multiple Choices: {}"),
    ],
    ids=["html", "deep", "300"],
)
async def test_an_answer_must_be_a_2xx_with_json(reply: Callable[[web.Request], web.Response], message: str) -> None:
    async with serving(Replies(reply)) as server:
        (record,) = await answer(server, [{}], max_retries=5)
    assert record["error"]["message"].startswith(message)


@pytest.mark.parametrize("header", ["soon", "\N{SUPERSCRIPT TWO}", "-1", ""])
async def test_a_retry_after_that_says_nothing_counts_as_none(header: str) -> None:
    async with serving(Replies(status(503, **{"Retry-After": header}), ok)) as server:
        (record,) = await answer(server, [{}], max_retries=1, base_retry_wait_time_in_s=0.001)
    assert record["http_response"] == {"ok": True}


async def test_waits_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.batch.stages.http.MAX_BACK_OFF_S", 0.002)
    replies = Replies(status(503))
    async with serving(replies) as server:
        await answer(server, [{}], max_retries=40, base_retry_wait_time_in_s=0.0001)
    assert len(replies.times) == 41


async def test_one_bad_row_costs_the_others_nothing() -> None:
    async with serving(Replies(ok)) as server:
        records = await answer(server, [{}, None, {"x": object()}, {}])
    assert [record.get("http_response") for record in records] == [{"ok": True}, None, None, {"ok": True}]
    assert records[1]["error"]["message"] == "payload=None: must be a dict"
    assert records[2]["error"]["message"].endswith("must be JSON")


async def test_a_file_of_requests(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f'{{"payload": {{"n": {n}}}}}\n' for n in range(200)))
    async with serving(Meeting(5)) as server:
        url = str(server.make_url("/"))
        with build_processor(HttpRequestProcessorConfig(url=url, http_request_stage={"concurrency": 5})) as processor:
            summary = await asyncio.to_thread(processor.run, source, target)
    assert (summary.tally.rows, summary.tally.failed) == (200, 0)
    assert [json.loads(line)["http_response"]["n"] for line in target.read_text().splitlines()] == [*range(200)]


async def test_numbers_of_numpy_are_json() -> None:
    async with serving(Meeting(1)) as server:
        (record,) = await answer(server, [{"a": np.arange(3), "b": np.float32(0.5)}])
    assert record["http_response"] == {"a": [0, 1, 2], "b": 0.5}


async def test_bytes_make_a_form() -> None:
    parts: list[tuple[str | None, str | None, str, bytes]] = []
    statuses = [503, 200]  # a retry sends the whole form again

    async def handler(request: web.Request) -> web.Response:
        parts.clear()
        async for part in await request.multipart():
            assert isinstance(part, aiohttp.BodyPartReader)
            parts.append((part.name, part.filename, part.headers["Content-Type"].partition(";")[0], await part.read()))
        assert request.headers["X-Key"] == "k"
        return web.json_response({}, status=statuses.pop(0))

    payload = {
        "model": "m",
        "options": {"n": 1},
        "file": b"\x00\x01",
        "page": {"content": b"<p>", "filename": "a.html", "content_type": "text/html"},
    }
    headers = {"X-Key": "k", "content-type": "application/json"}
    async with serving(handler) as server:
        (record,) = await answer(server, [payload], headers=headers, max_retries=1, base_retry_wait_time_in_s=0.001)
    assert record["http_response"] == {}
    assert parts == [
        ("model", None, "text/plain", b"m"),
        ("options", None, "text/plain", b'{"n":1}'),
        ("file", "file", "application/octet-stream", b"\x00\x01"),
        ("page", "a.html", "text/html", b"<p>"),
    ]


async def test_a_message_is_no_form() -> None:
    payload = {"message": {"role": "user", "content": "hi"}}
    async with serving(Meeting(1)) as server:
        (record,) = await answer(server, [payload])
    assert record["http_response"] == payload


async def test_headers_and_session_are_the_users() -> None:
    seen: dict[str, str] = {}
    sessions: list[aiohttp.ClientSession] = []

    def session() -> aiohttp.ClientSession:
        sessions.append(aiohttp.ClientSession(headers={"X-Session": "s"}, timeout=aiohttp.ClientTimeout(total=0.05)))
        return sessions[-1]

    async def handler(request: web.Request) -> web.Response:
        seen.update(request.headers)
        if (await request.json())["slow"]:
            await asyncio.Event().wait()
        return web.json_response({})

    async with serving(handler) as server:
        headers = {"Authorization": "Bearer t"}
        fast, slow = await answer(server, [{"slow": 0}, {"slow": 1}], headers=headers, session_factory=session)
    assert fast["http_response"] == {}
    assert slow["error"]["type"] in ("ServerTimeoutError", "TimeoutError")
    assert (seen["Authorization"], seen["X-Session"], seen["Content-Type"]) == ("Bearer t", "s", "application/json")
    assert len(sessions) == 1 and sessions[0].closed


async def test_a_job_that_ends_early_leaves_no_request_behind() -> None:
    arrived, cancelled, answered = asyncio.Semaphore(0), asyncio.Semaphore(0), list[Row]()

    async def handler(request: web.Request) -> web.Response:
        arrived.release()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.release()
        return web.Response()

    async def each(of: asyncio.Semaphore) -> None:
        for _ in range(8):
            await of.acquire()

    async with serving(handler) as server:
        before = asyncio.all_tasks()
        config = HttpRequestProcessorConfig(url=str(server.make_url("/")), http_request_stage={"concurrency": 8})
        flow = build_processor(config).flow()
        await flow.open()
        flow.push([Row.of(i, {"payload": {}}) for i in range(20)], answered.extend)
        await asyncio.wait_for(each(arrived), 30)
        await flow.close()
        await flow.close()
        ours = {task for task in asyncio.all_tasks() - before if "headway" in str(task.get_coro())}
        await asyncio.wait_for(each(cancelled), 30)
    assert not ours and not answered


async def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependencyError, match=r"headway\[http\]"):
        await build_processor(HttpRequestProcessorConfig(url="http://x")).flow().open()


@pytest.mark.parametrize(("name", "value"), [("qps", 0), ("http_request_stage", False), ("concurrency", 0)])
def test_a_setting_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        HttpRequestProcessorConfig(**{"url": "http://x", name: value})
