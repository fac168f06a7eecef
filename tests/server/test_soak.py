"""Many clients for long, and what a busy model leaves for others: minutes each."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.server.conftest import Served

MODEL = "smollm2-135m-instruct"
CLIENTS, SOAK_S, WARM_UP_S, TOKENS = 500, float(os.environ.get("SOAK_S", "150")), 60, 64
STREAMS, BUSY_S = 64, 30
SLOPE_MB_PER_MIN = 1.0
P99_S = 0.02

pytestmark = [pytest.mark.long, pytest.mark.timeout(SOAK_S + 450)]


@pytest.fixture
def slow() -> Iterator[Served]:
    executor = ("--distributed-executor-backend", "tests.server.wide:Slow")
    server = Served(MODEL, *executor, "--max-num-seqs", "512")
    yield server
    assert server.end() == 0, server.log


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def _stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[str, int]:
    """The text of all chunks, and how many tokens the server says there were."""
    texts: list[str] = []
    usage = 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with session.post(f"{url}/v1/completions", json={**body, **options}) as answer:
        assert answer.status == 200, await answer.text()
        last = b""
        async for line in answer.content:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                texts += [choice["text"] for choice in chunk["choices"]]
                usage = (chunk["usage"] or {}).get("completion_tokens", usage)
            last = line.strip() or last
    assert last == b"data: [DONE]"
    return "".join(texts), usage


def _body(i: int) -> dict[str, Any]:
    return {"prompt": f"Tale {i % 20}.", "max_tokens": TOKENS, "temperature": 0, "seed": i % 20, "ignore_eos": True}


def _resident_mb(server: Served) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return float(status.split("VmRSS:")[1].split()[0]) / 1024


async def test_500_clients_lose_nothing_and_cost_no_memory(slow: Served, session: aiohttp.ClientSession) -> None:
    expected = [await _stream(session, slow.url, _body(i)) for i in range(20)]
    assert len({text for text, _ in expected}) == 20
    begun = time.monotonic()
    answers = 0

    async def client(i: int) -> None:
        nonlocal answers
        while time.monotonic() - begun < SOAK_S:
            assert await _stream(session, slow.url, _body(i)) == expected[i % 20]
            answers += 1

    seen: list[tuple[float, float]] = []

    async def measure() -> None:
        while (now := time.monotonic() - begun) < SOAK_S:
            if now > WARM_UP_S:
                seen.append((now / 60, _resident_mb(slow)))
            await asyncio.sleep(0.5)

    await asyncio.gather(measure(), *(client(i) for i in range(CLIENTS)))
    slope, _ = statistics.linear_regression(*zip(*seen))
    print(f"{answers} answers, {answers * TOKENS / SOAK_S:.0f} tokens/s, {seen[-1][1]:.0f} MB, {slope:.2f} MB/min")
    assert answers > CLIENTS
    assert slope < SLOPE_MB_PER_MIN, seen


async def test_health_answers_in_time_while_the_model_is_busy(served: Served, session: aiohttp.ClientSession) -> None:
    """On a machine that does nothing else."""
    body = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 2000, "ignore_eos": True}
    streams = [asyncio.ensure_future(_stream(session, served.url, body)) for _ in range(STREAMS)]
    seconds: list[float] = []
    begun = time.monotonic()
    while time.monotonic() - begun < BUSY_S:
        at = time.perf_counter()
        async with session.get(f"{served.url}/health") as answer:
            assert answer.status == 200
        seconds.append(time.perf_counter() - at)
        await asyncio.sleep(0.02)
    assert not any(stream.done() for stream in streams), "the model was not busy all the time"
    for stream in streams:
        stream.cancel()
    await asyncio.wait(streams)
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[-1]
    print(f"/health: median {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms of {len(seconds)}")
    assert p99 < P99_S
