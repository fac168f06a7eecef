"""What becomes of an engine with worker processes, and of everything it started, when one of its processes fails."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.scenarios import what_is_left

from headway import LLM, AsyncLLM, RequestOutput, SamplingParams
from headway.errors import EngineDead, EngineError, ModelError, WorkerDied, WorkerError

SMALL: dict[str, Any] = {
    "distributed_executor_backend": "mp",
    "max_model_len": 512,
    "max_num_seqs": 4,
    "threads": 1,
}
PROMPTS = ["One", "Two words", "And three words"]
LONG = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (4, 400, 400)]


class Fault:
    """Happens to a worker while requests run: when the shortest of them has ended."""

    def __init__(self, pid: int, number: signal.Signals) -> None:
        self._pid, self._number = pid, number
        self.at = 0.0

    def __call__(self, output: RequestOutput) -> None:
        if self.at == 0.0:
            os.kill(self._pid, self._number)
            self.at = time.monotonic()
            time.sleep(0.3)  # what the fault does to other ranks is known by the time that anybody looks


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(limit_s: float, happened: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(autouse=True, scope="module")
def imported() -> None:
    """What the first engine of a process opens for good is open before anything is counted."""
    with LLM("smollm2-135m-instruct", **SMALL) as llm:
        llm.generate(PROMPTS, LONG[0])


each_rank = pytest.mark.parametrize(
    ("parallel", "rank"),
    [
        pytest.param({}, 0, id="alone"),
        pytest.param({"tensor_parallel_size": 2}, 0, id="tensor rank 0"),
        pytest.param({"tensor_parallel_size": 2}, 1, id="tensor rank 1"),
        pytest.param({"pipeline_parallel_size": 2}, 0, id="first stage"),
        pytest.param({"pipeline_parallel_size": 2}, 1, id="last stage"),
    ],
)


@each_rank
def test_callers_learn_of_a_killed_worker_within_two_seconds(parallel: dict[str, int], rank: int) -> None:
    before = what_is_left()
    with LLM("smollm2-135m-instruct", **SMALL, **parallel) as llm:
        pids = llm.executor_info.pids
        fault = Fault(pids[rank], signal.SIGKILL)
        with pytest.raises(WorkerDied, match=f"rank {rank} ended with status -9"):
            llm.generate(PROMPTS, LONG, on_output=fault)
        assert time.monotonic() - fault.at < 2
        with pytest.raises(EngineDead, match=f"rank {rank} ended with status -9"):
            llm.generate(PROMPTS)
    assert time.monotonic() - fault.at < 5
    assert what_is_left() <= before and not any(map(alive, pids))


@pytest.mark.parametrize(
    ("parallel", "rank"),
    [
        pytest.param({"tensor_parallel_size": 2}, 0, id="tensor rank 0"),
        pytest.param({"tensor_parallel_size": 2}, 1, id="tensor rank 1"),
        pytest.param({"pipeline_parallel_size": 2}, 0, id="first stage"),
    ],
)
def test_callers_learn_of_a_stopped_worker_within_the_time_limit(parallel: dict[str, int], rank: int) -> None:
    before = what_is_left()
    with LLM("smollm2-135m-instruct", **SMALL, **parallel, step_timeout_s=1) as llm:
        pids = llm.executor_info.pids
        fault = Fault(pids[rank], signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"within 1(\.0)? s \(step_timeout_s\)"):
            llm.generate(PROMPTS, LONG, on_output=fault)
        assert time.monotonic() - fault.at < 2.5
    assert time.monotonic() - fault.at < 5
    assert what_is_left() <= before and not any(map(alive, pids))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of an engine whose workers fail when a signal tells them to."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    return {**SMALL, "distributed_executor_backend": "failing:FailingExecutor"}


@each_rank
def test_callers_get_the_exception_of_a_step_on_any_rank(
    failing: dict[str, Any], parallel: dict[str, int], rank: int
) -> None:
    before = what_is_left()
    with LLM("smollm2-135m-instruct", **failing, **parallel) as llm:
        fault = Fault(llm.executor_info.pids[rank], signal.SIGUSR1)
        with pytest.raises(WorkerError, match=f"rank {rank}: ZeroDivisionError: unlucky"):
            llm.generate(PROMPTS, LONG, on_output=fault)
        assert time.monotonic() - fault.at < 2
    assert what_is_left() <= before


def test_a_ring_whose_counts_make_no_sense_is_told_with_its_rank(failing: dict[str, Any]) -> None:
    before = what_is_left()
    with LLM("smollm2-135m-instruct", **failing, tensor_parallel_size=2) as llm:
        fault = Fault(llm.executor_info.pids[1], signal.SIGUSR2)
        with pytest.raises(EngineError, match="rank 1 wrote what is no message: the counts of a ring"):
            llm.generate(PROMPTS, LONG, on_output=fault)
    assert what_is_left() <= before


def test_a_slow_worker_is_no_fault(failing: dict[str, Any]) -> None:
    with LLM("smollm2-135m-instruct", **failing, tensor_parallel_size=2, step_timeout_s=1) as llm:
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 10, 10)]
        slow = Fault(llm.executor_info.pids[1], signal.SIGWINCH)
        outputs = llm.generate(PROMPTS, params, on_output=slow)
        assert time.monotonic() - slow.at > 1
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 10, 10]


FULL_SHARED_MEMORY = """
set -e
mount -t tmpfs -o size=4096 none /dev/shm
head -c 4096 /dev/zero > /dev/shm/full
exec "$0" -c "$1"
"""
RUNS_ONCE = """
from headway import LLM
with LLM("smollm2-135m-instruct", distributed_executor_backend="mp", threads=1, max_model_len=64, max_num_seqs=1,
         tensor_parallel_size=2) as llm:
    print(len(llm.generate("Hello", None)[0].outputs))
"""


def test_a_full_dev_shm_is_of_no_concern() -> None:
    own_mounts = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*own_mounts, "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("this user may not have mounts of its own")
    command = [*own_mounts, "sh", "-c", FULL_SHARED_MEMORY, sys.executable, RUNS_ONCE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr


async def test_every_stream_of_an_async_engine_ends_with_the_error() -> None:
    llm = AsyncLLM("smollm2-135m-instruct", **SMALL)
    try:
        streams = [llm.generate(prompt, LONG[1]) for prompt in PROMPTS]
        for stream in streams:
            await anext(stream)
        os.kill(llm.executor_info.pids[0], signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineError, match="rank 0 ended with status -9"):
                async for _ in stream:
                    pass
    finally:
        llm.close()


def test_a_model_that_its_workers_cannot_load_leaves_nothing(minilm_dir: Path, tmp_path: Path) -> None:
    model = shutil.copytree(minilm_dir, tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = what_is_left()
    with pytest.raises(ModelError):
        LLM(str(model), distributed_executor_backend="mp", tensor_parallel_size=2)
    assert what_is_left() <= before


FRONT_END = """
import sys
from headway import LLM, SamplingParams

llm = LLM("smollm2-135m-instruct", distributed_executor_backend="mp", threads=1, max_model_len=512, max_num_seqs=4,
          tensor_parallel_size=2)
params = SamplingParams(max_tokens=8, ignore_eos=True)
print(*llm.executor_info.pids, flush=True)
"""
STAYS_IDLE = "sys.stdin.read()"
RUNS = """
while True:
    llm.generate("Once upon a time", params, on_output=lambda output: print("ran", flush=True))
"""
IS_INTERRUPTED = """
try:
    while True:
        llm.generate(["Once", "upon"], params, on_output=lambda output: print("ran", flush=True))
except KeyboardInterrupt:
    print(len(llm.generate("a time", SamplingParams(max_tokens=3))[0].outputs), flush=True)
"""


def front_end(script: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A program with an engine; its workers' process ids."""
    program = subprocess.Popen(
        [sys.executable, "-c", FRONT_END + script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert program.stdout is not None
    return program, [int(pid) for pid in program.stdout.readline().split()]


@pytest.mark.parametrize("script", [STAYS_IDLE, RUNS], ids=["idle", "running"])
def test_a_killed_front_end_takes_its_workers_along(script: str) -> None:
    program, pids = front_end(script)
    with program:
        assert len(pids) == 2 and all(map(alive, pids))
        if script is RUNS:
            assert program.stdout is not None and program.stdout.readline() == "ran\n"
        program.kill()
    assert within(5, lambda: not any(map(alive, pids)))


def test_a_program_that_ends_without_close_leaves_nothing_and_says_nothing() -> None:
    program, pids = front_end("")
    output, errors = program.communicate(timeout=30)
    assert (program.returncode, output, errors, len(pids)) == (0, "", "", 2)
    assert not any(map(alive, pids))


def test_ctrl_c_in_the_terminal_leaves_the_engine_usable() -> None:
    program, pids = front_end(IS_INTERRUPTED)
    assert program.stdout is not None and program.stdout.readline() == "ran\n"
    os.killpg(program.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    output, errors = program.communicate(timeout=30)
    assert (program.returncode, output.splitlines()[-1], errors) == (0, "1", "")
    assert not any(map(alive, pids))
