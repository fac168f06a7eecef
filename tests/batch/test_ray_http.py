"""HTTP requests from the workers of a Ray dataset."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

pytest.importorskip("ray.data", exc_type=ImportError)

import ray.data

from headway.batch import HttpRequestProcessorConfig, build_processor

pytestmark = pytest.mark.usefixtures("ray_here")


class Doubling:
    """Answers once ``size`` requests have been there at the same time."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.inside = self.most = 0
        self.changed = asyncio.Condition()

    async def __call__(self, request: web.Request) -> web.Response:
        number = (await request.json())["n"]
        async with self.changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.changed.notify_all()
            await self.changed.wait_for(lambda: self.most >= self.size)
            self.inside -= 1
        return web.json_response({"n": 2 * number}, status=400 if number == 7 else 200)


@contextmanager
def serving(handler: Doubling) -> Generator[str]:
    """On a thread: Ray Data has this one."""
    loop, ready, ended = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    urls: list[str] = []

    async def serve() -> None:
        app = web.Application()

        async def handle(request: web.Request) -> web.Response:
            return await handler(request)

        app.router.add_post("/", handle)
        async with TestServer(app) as server:
            urls.append(str(server.make_url("/")))
            ready.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(30)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def test_one_worker_has_as_many_requests_under_way_as_the_stage_says() -> None:
    doubling = Doubling(size=8)
    with serving(doubling) as url:
        config = HttpRequestProcessorConfig(
            url=url, http_request_stage={"concurrency": 8}, should_continue_on_error=True
        )
        processor = build_processor(config, preprocess=lambda row: {"payload": {"n": row["id"]}})
        rows = processor(ray.data.range(40, override_num_blocks=4)).take_all()
    assert doubling.most == 8
    answered = {row["id"]: row["http_response"]["n"] for row in rows if row["error"] is None}
    assert answered == {n: 2 * n for n in range(40) if n != 7}
    (failed,) = (row for row in rows if row["error"] is not None)
    assert failed["id"] == 7 and failed["error"]["message"].startswith("400 Bad Request: ")
