"""An engine that loses a worker process while it has nothing to do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headway import LLM, AsyncLLM, SamplingParams
from headway.errors import EngineDead


@pytest.fixture(scope="module")
def settings(tiny_opt: Path) -> dict[str, Any]:
    """Of an engine of two ranks, whose model is small and random."""
    small = {"load_format": "dummy", "threads": 1, "kv_cache_memory_bytes": 10_000_000}
    return {"model": str(tiny_opt), **small, "distributed_executor_backend": "mp", "tensor_parallel_size": 2}


def gone(pids: list[int], limit_s: float = 20) -> bool:
    deadline = time.monotonic() + limit_s
    while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            return not left
        time.sleep(0.02)
    return True


def test_a_killed_worker_costs_the_trace_its_steps_and_nothing_else(settings: dict[str, Any], tmp_path: Path) -> None:
    trace, usual = tmp_path / "trace.json", sys.getswitchinterval()
    llm = LLM(**settings, trace=str(trace))
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))
    pids = llm.executor_info.pids
    os.kill(pids[0], signal.SIGKILL)
    llm.close()
    assert gone(pids) and sys.getswitchinterval() == usual
    assert {event["tid"] for event in json.loads(trace.read_text())} == {0, 1}


def test_an_idle_engine_notices_and_ends_the_other_ranks(settings: dict[str, Any]) -> None:
    async def use() -> None:
        async with AsyncLLM(**settings) as llm:
            pids = llm.executor_info.pids
            os.kill(pids[1], signal.SIGKILL)
            assert await asyncio.to_thread(gone, pids)
            with pytest.raises(EngineDead, match="rank 1 ended"):
                await anext(llm.generate([1, 2, 3]))

    asyncio.run(use())
