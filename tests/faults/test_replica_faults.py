"""What becomes of replicas, of their requests and of what they started, when a process is killed under load."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headway import AsyncLLM, SamplingParams
from headway.errors import EngineDead, EngineError
from headway.executor.channel import curve
from headway.executor.child import own_modules
from headway.executor.fake import FakeModel, prefix_state
from headway.llm.frontend import find
from headway.llm.replicas import start_engines

LONG = 300  # 1.5 s


@pytest.fixture
def settings(tiny_opt: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return {
        "model": str(tiny_opt),
        "load_format": "dummy",
        "max_model_len": 512,
        "threads": 1,
        "distributed_executor_backend": "slow:SlowExecutor",
        "data_parallel_size": 2,
    }


@pytest.fixture
async def llm(settings: dict[str, Any]) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(**settings) as llm:
        yield llm


def tokens_alone(prompt: list[int], seed: int, count: int) -> list[int]:
    state, tokens = prefix_state(prompt), []
    while len(tokens) < count:
        tokens.append(FakeModel().next_token(state, seed))
        state = prefix_state(tokens[-1:], state)
    return tokens


def long(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=LONG, ignore_eos=True)


async def answer(llm: AsyncLLM, seed: int, **options: Any) -> list[int]:
    return [t async for d in llm.generate([1, 2], long(seed), **options) for t in d.outputs[0].token_ids]


async def begun(llm: AsyncLLM, seeds: range, **options: Any) -> list[asyncio.Task[list[int]]]:
    """Streams that have had a token each."""
    started: list[asyncio.Event] = []

    async def stream(seed: int, first: asyncio.Event) -> list[int]:
        tokens: list[int] = []
        async for delta in llm.generate([1, 2], long(seed), **options):
            tokens += delta.outputs[0].token_ids
            first.set()
        return tokens

    tasks: list[asyncio.Task[list[int]]] = []
    for seed in seeds:
        started.append(asyncio.Event())
        tasks.append(asyncio.create_task(stream(seed, started[-1])))
    await asyncio.gather(*(first.wait() for first in started))
    return tasks


async def within(limit_s: float, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def up(llm: AsyncLLM) -> list[bool]:
    return [health.up for health in llm.health()]


async def test_of_a_killed_replica_only_what_it_had_begun_to_stream_is_lost(llm: AsyncLLM) -> None:
    lost = await begun(llm, range(4), data_parallel_rank=0)
    others = await begun(llm, range(4, 8), data_parallel_rank=1)
    unanswered = [asyncio.create_task(answer(llm, seed, stream=False)) for seed in range(8, 24)]
    await within(5, lambda: llm.metrics().running == 24)
    before = llm.metrics().generated_tokens
    os.kill(llm.executor_info.pids[0], signal.SIGKILL)
    killed = time.monotonic()
    for error in await asyncio.gather(*lost, return_exceptions=True):
        assert isinstance(error, EngineDead) and "replica 0: its process ended with status -9" in str(error)
    assert up(llm) == [False, True] and "status -9; it starts again in 1 s" in llm.health()[0].why
    with pytest.raises(EngineDead, match="replica 0 does not run: its process ended"):
        await answer(llm, 0, data_parallel_rank=0)
    answers = await asyncio.gather(*others, *unanswered)
    assert answers == [tokens_alone([1, 2], seed, LONG) for seed in range(4, 24)]
    await within(killed + 10 - time.monotonic(), lambda: up(llm) == [True, True])
    assert await answer(llm, 1, data_parallel_rank=0) == tokens_alone([1, 2], 1, LONG)
    assert llm.metrics().generated_tokens >= before + LONG


async def test_a_replica_that_stood_still_loses_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "_BEAT_MS", 20)  # of this end; the other one's is still 5 s
    async with AsyncLLM(**settings) as llm:
        (stream,) = await begun(llm, range(1), data_parallel_rank=0)
        os.kill(llm.executor_info.pids[0], signal.SIGSTOP)
        await asyncio.sleep(0.5)
        os.kill(llm.executor_info.pids[0], signal.SIGCONT)
        assert await asyncio.wait_for(stream, 10) == tokens_alone([1, 2], 0, LONG)


async def test_where_no_replica_is_left_requests_fail_until_one_is_back(llm: AsyncLLM) -> None:
    unanswered = [asyncio.create_task(answer(llm, seed, stream=False)) for seed in range(4)]
    await within(5, lambda: llm.metrics().running == 4)
    for pid in llm.executor_info.pids:
        os.kill(pid, signal.SIGKILL)
    for error in await asyncio.gather(*unanswered, return_exceptions=True):
        assert isinstance(error, EngineDead)
    with pytest.raises(EngineDead, match=r"no replica runs: replica 0: .*; replica 1: .*it starts again"):
        await answer(llm, 0)
    await within(10, lambda: all(up(llm)))
    assert len(await answer(llm, 0)) == LONG


async def test_a_replica_that_starts_again_sleeps_like_the_others(settings: dict[str, Any]) -> None:
    settings["distributed_executor_backend"] = "uni"
    async with AsyncLLM(**settings) as llm:
        await llm.sleep(1)
        os.kill(llm.executor_info.pids[1], signal.SIGKILL)
        await within(2, lambda: up(llm) == [True, False])
        await within(10, lambda: all(up(llm)))
        with pytest.raises(EngineError, match="the engine sleeps"):
            await answer(llm, 0, data_parallel_rank=1)
        await llm.wake_up()
        assert len(await answer(llm, 0, data_parallel_rank=1)) == LONG


async def test_a_replica_that_lost_a_worker_says_so(settings: dict[str, Any]) -> None:
    settings["distributed_executor_backend"] = "mp"
    async with AsyncLLM(**settings) as llm:
        (stream,) = await begun(llm, range(1), data_parallel_rank=1)
        os.kill(llm.executor_info.pids[1], signal.SIGKILL)
        with pytest.raises(EngineDead, match="replica 1: rank 0 ended with status -9"):
            await stream
        assert up(llm) == [True, False]


async def test_where_that_is_asked_for_a_death_is_the_end_of_all(settings: dict[str, Any]) -> None:
    supervisor, seat = start_engines(find(**settings), on_death="exit")
    pids = seat.info.pids
    async with AsyncLLM.over(seat.frontend(), supervisor.client()) as llm:
        streams = await begun(llm, range(1), data_parallel_rank=1)
        os.kill(pids[0], signal.SIGKILL)
        assert "replica 0: its process ended with status -9" in str(await llm.ended())
        for error in await asyncio.gather(*streams, return_exceptions=True):
            assert isinstance(error, EngineDead) and "replica 0" in str(error)
        with pytest.raises(EngineDead, match="replica 0"):
            await answer(llm, 0)
    assert not any(map(alive, pids))


OFFLINE = """
import json, sys
from headway import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(**json.loads(sys.argv[1]))
    print(*llm.executor_info.pids, flush=True)
    llm.generate([[1, 2]] * 8, SamplingParams(max_tokens=2, ignore_eos=True))
    print("ran", flush=True)
    llm.generate([[1, 2]] * 8, SamplingParams(max_tokens=400, ignore_eos=True))
"""


async def test_a_killed_front_end_leaves_no_process_and_no_file(settings: dict[str, Any], tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", OFFLINE, json.dumps(settings)],
        stdout=subprocess.PIPE,
        text=True,
        env={**own_modules(), "TMPDIR": str(tmp_path)},
    )
    with program:
        assert program.stdout is not None
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2 and program.stdout.readline() == "ran\n"
        program.kill()
    await within(5, lambda: not any(map(alive, pids)))
    assert not list(tmp_path.iterdir())


FRONT_END = """
import asyncio, msgspec, socket, sys
from headway import AsyncLLM, SamplingParams
from headway.llm.replicas import Seat

async def main():
    seat = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Seat)
    llm = AsyncLLM.over(*seat.join(socket.socket(fileno=int(sys.argv[1]))))
    async for delta in llm.generate([1, 2], SamplingParams(max_tokens=400, ignore_eos=True), stream=len(sys.argv) < 3):
        print("ran", flush=True)

asyncio.run(main())
"""


async def test_requests_of_a_front_end_that_is_killed_leave_the_engines(settings: dict[str, Any]) -> None:
    supervisor, seat = start_engines(find(**{**settings, "data_parallel_size": 1}))
    with supervisor.seat() as link:
        program = subprocess.Popen(
            [sys.executable, "-c", FRONT_END, str(link.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[link.fileno()],
            env=own_modules(),
        )
    async with AsyncLLM.over(seat.frontend(), supervisor.client()) as llm:
        with program:
            assert program.stdin is not None and program.stdout is not None
            program.stdin.write(msgspec.msgpack.encode(seat))
            program.stdin.close()
            assert program.stdout.readline() == b"ran\n"
            await within(2, lambda: llm.metrics().running == 1)
            program.kill()
        killed = time.monotonic()
        await within(5, lambda: llm.metrics().running == 0)
        assert time.monotonic() - killed < 1  # long before its 400 tokens are out
        assert len(await answer(llm, 3)) == LONG


async def test_weights_that_only_the_others_have_keep_a_replica_out(minilm_dir: Path) -> None:
    from safetensors.torch import load_file

    new = {name: tensor * 0.5 for name, tensor in load_file(minilm_dir / "model.safetensors").items()}
    async with AsyncLLM(str(minilm_dir), threads=1, data_parallel_size=2) as llm:

        async def vectors() -> list[list[float]]:
            """Of both replicas: they take turns."""
            return [(await llm.embed([101, 2000, 102])).data for _ in range(2)]

        old, same = await vectors()
        assert old == same
        await llm.update_weights(new)
        halved, same = await vectors()
        assert halved == same != old
        os.kill(llm.executor_info.pids[0], signal.SIGKILL)
        await within(10, lambda: "the weights that it was started with" in llm.health()[0].why)
        assert await vectors() == [halved, halved]
        await llm.update_weights(minilm_dir)
        assert up(llm) == [True, True]
        assert await vectors() == [old, old]
        os.kill(llm.executor_info.pids[1], signal.SIGKILL)
        await within(2, lambda: up(llm) == [True, False])
        await within(10, lambda: all(up(llm)))
        assert await vectors() == [old, old]
