"""Starts, and starts again."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path
from typing import ClassVar

import pytest

from headway.engine import supervise
from headway.engine.local import LocalRun
from headway.engine.supervise import Backoff, Supervisor, Tell
from headway.engine.wire import EngineTicket, Status
from headway.llm.frontend import find


def test_the_time_before_a_start_grows_to_half_a_minute_and_no_more() -> None:
    backoff = Backoff()
    delays = [backoff.next() for _ in range(2000)]
    assert delays[:6] == [1, 2, 4, 8, 16, 30] and set(delays[5:]) == {30}


class SecondFails(LocalRun):
    starts: ClassVar[int] = 0

    def __init__(self, loop: asyncio.AbstractEventLoop, ticket: EngineTicket, tell: Tell) -> None:
        SecondFails.starts += 1
        if SecondFails.starts == 2:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        super().__init__(loop, ticket, tell)


async def test_a_process_that_cannot_be_started_is_tried_again(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY_S", 0.01)
    found = find(str(tiny_opt), load_format="dummy", max_model_len=512, distributed_executor_backend="fake")
    ticket = EngineTicket(replica=0, config=found.config, facts=found.facts, tokenizer=found.tokenizer)
    supervisor = Supervisor(ticket, 1, SecondFails)
    try:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[Status]()
        supervisor.listen(lambda status: loop.call_soon_threadsafe(told.put_nowait, status) and None)
        first = await told.get()
        os.kill(supervisor.ready[0].info.pids[0], signal.SIGKILL)
        killed, failed, again = [await asyncio.wait_for(told.get(), 20) for _ in range(3)]
        assert "status -9" in killed.why and "could not be started" in failed.why and "no more processes" in failed.why
        assert again.address is not None and again.address != first.address
    finally:
        supervisor.close()
