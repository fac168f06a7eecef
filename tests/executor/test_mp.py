"""Worker processes, most of them with a small worker that has no model."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.conformance.scenarios import what_is_left

from headway import LLM, SamplingParams
from headway.config import EngineConfig, ModelConfig, ParallelConfig
from headway.errors import EngineDead, EngineError, ModelError, WorkerDied, WorkerError
from headway.executor.launcher import Placement
from headway.executor.mp import MpExecutor, MpLauncher
from headway.executor.remote import RemoteExecutor
from headway.messages import StepPlan

RAISE, DIE, STOP, SLEEP, BIG, GARBAGE, UNASKED = range(1, 8)  # see small_worker.py
Make = Callable[..., MpExecutor]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    made: list[MpExecutor] = []

    def make(ranks: int = 1, path: str = "", **parallel: Any) -> MpExecutor:
        config = EngineConfig(
            model=ModelConfig(path=path, served_model_name=""),
            parallel=ParallelConfig(executor="mp", tensor_parallel_size=ranks, **parallel),
        )
        made.append(MpExecutor(config, "small_worker:SmallWorker"))
        return made[-1]

    yield make
    for executor in made:
        executor.close()


def plan(step: int, *what: int, size: int = 0) -> StepPlan:
    return StepPlan(step=step, releases=list(what), runs=bytes(size))


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def wakeups(pids: list[int]) -> int:
    """How often the threads of these processes have gone to sleep or been interrupted."""
    statuses = [task.read_text() for pid in pids for task in Path(f"/proc/{pid}/task").glob("*/status")]
    return sum(int(n) for text in statuses for n in re.findall(r"ctxt_switches:\s+(\d+)", text))


def settles(count: Callable[[], int], quiet_s: float = 0.5, limit_s: float = 20) -> bool:
    """Whether the count stays the same for quiet_s."""
    deadline, last = time.monotonic() + limit_s, -1
    while time.monotonic() < deadline:
        if last == (last := count()):
            return True
        time.sleep(quiet_s)
    return False


@pytest.mark.parametrize("depth", [0, 1])
def test_tokens_are_those_of_uni(depth: int) -> None:
    prompts = ["The capital of France is", "Once upon a time there was", "1 2 3 4 5"]
    params = [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(temperature=1.0, seed=7, top_p=0.9, repetition_penalty=1.2, max_tokens=9, logprobs=2),
        SamplingParams(temperature=0, max_tokens=3),
    ]
    outputs: list[list[object]] = []
    for executor in ("uni", "mp"):
        settings = {"max_model_len": 512, "max_num_seqs": 4, "threads": 1, "async_scheduling": bool(depth)}
        with LLM("smollm2-135m-instruct", distributed_executor_backend=executor, **settings) as llm:
            assert llm.executor_info.executor == executor
            outputs.append([(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in llm.generate(prompts, params)])
    assert outputs[0] == outputs[1]


def test_a_whole_engine_needs_no_torch_outside_its_workers() -> None:
    script = """
import sys
from headway import LLM
with LLM("smollm2-135m-instruct", distributed_executor_backend="mp", max_model_len=64, max_num_seqs=1) as llm:
    assert len(llm.generate("Hello", None)[0].outputs[0].token_ids) > 0
assert "torch" not in sys.modules and "zmq" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_ranks_are_one_worker_to_the_engine(make: Make) -> None:
    executor = make(3)
    info = executor.start()
    assert (info.num_blocks, info.weights_bytes, info.kv_bytes, info.startup_s) == (8, 21, 15, {"load": 2.0})
    assert len(set(info.pids)) == 3 and os.getpid() not in info.pids
    assert executor.call("echo", 1, "two", b"three", [4.0]) == [[r, 1, "two", b"three", [4.0]] for r in range(3)]
    assert executor.call("loaded", "torch") == [False] * 3
    executor.health()


def test_results_come_in_order_whoever_waits(make: Make) -> None:
    executor = make(2)
    executor.start()
    with ThreadPoolExecutor(4) as threads:
        futures = [executor.submit(plan(step, SLEEP, 0, 1, size=4 * step)) for step in range(20)]
        waiting = [threads.submit(future.result) for future in reversed(futures)]
        assert [len(each.result().tokens) for each in reversed(waiting)] == [4 * step for step in range(20)]


def test_plans_and_results_of_any_size_pass_at_the_same_time(make: Make) -> None:
    executor = make(2)
    executor.start()
    futures = [executor.submit(plan(step, BIG, 0, 3_000_000, size=5_000_000)) for step in range(6)]
    assert [len(future.result().tokens) for future in futures] == [3_000_000] * 6


def test_masks_may_follow_later_plans(make: Make) -> None:
    executor = make(2)
    executor.start()
    masked = [executor.submit(StepPlan(step=step, runs=b"", masked_slots=[0])) for step in (1, 2)]
    last = executor.submit(plan(3, size=8))
    with pytest.raises(TimeoutError):
        masked[0].result(timeout=0.05)
    executor.mask(2, {0: b"two"})
    executor.mask(1, {0: b"one"})
    assert [f.result().tokens for f in (*masked, last)] == [b"one", b"two", bytes(8)]


class Far(MpLauncher):
    """Treats some ranks of this node as if they were on another."""

    def __init__(self, *remote: int) -> None:
        super().__init__()
        self._remote = remote

    def place(self) -> Placement:
        return Placement(remote=frozenset(self._remote), store="127.0.0.1:1")


@pytest.mark.parametrize("remote", [(1,), (0,), (0, 1)], ids=["one here, one there", "results from there", "all there"])
def test_ranks_on_other_nodes_are_like_all_others(make: Make, remote: tuple[int, ...]) -> None:
    before = what_is_left()
    executor = RemoteExecutor(make(2)._config, Far(*remote), "small_worker:SmallWorker")  # pyright: ignore
    try:
        info = executor.start()
        futures = [executor.submit(plan(step, BIG, 0, 3_000_000, size=5_000_000)) for step in range(3)]
        assert [len(future.result().tokens) for future in futures] == [3_000_000] * 3
        masked = executor.submit(StepPlan(step=3, runs=b"", masked_slots=[0]))
        executor.mask(3, {0: b"mask"})
        assert masked.result().tokens == b"mask"
        assert executor.call("echo", 5) == [[0, 5], [1, 5]]
        os.kill(info.pids[1], signal.SIGKILL)
        with pytest.raises(WorkerDied, match="rank 1"):
            executor.submit(plan(4, SLEEP, 0, 60_000)).result()
    finally:
        executor.close()
    assert gone(info.pids) and what_is_left() <= before


def test_an_exception_in_a_step_of_any_rank_ends_it_at_once(make: Make) -> None:
    executor = make(2)
    executor.start()
    slow = executor.submit(plan(1, SLEEP, 0, 3000))
    bad = executor.submit(plan(2, RAISE, 1))
    with pytest.raises(WorkerError, match="rank 1: ZeroDivisionError: unlucky") as caught:
        slow.result(2)
    assert (caught.value.rank, caught.value.kind, caught.value.message) == (1, "ZeroDivisionError", "unlucky")
    assert 'raise ZeroDivisionError("unlucky")' in caught.value.remote_traceback
    assert bad.exception() is caught.value
    with pytest.raises(EngineDead, match="unlucky"):
        executor.submit(plan(3))
    with pytest.raises(WorkerError, match="unlucky"):
        executor.health()


def test_an_exception_in_a_call_costs_only_that_call(make: Make) -> None:
    executor = make(2)
    executor.start()
    with pytest.raises(WorkerError, match="rank 1: KeyError: 'no such thing'"):
        executor.call("fail", 1)
    with pytest.raises(WorkerError, match="AttributeError"):
        executor.call("fly")
    executor.health()
    assert executor.submit(plan(0)).result().step == 0


def test_a_call_that_times_out_desynchronises_nothing(make: Make) -> None:
    executor = make(2)
    executor.start()
    with pytest.raises(TimeoutError):
        executor.call("sleep", 0.3, timeout=0.01)
    assert executor.call("echo", "next") == [[0, "next"], [1, "next"]]


def test_a_call_of_a_stopped_worker_ends_within_the_time_limit(make: Make) -> None:
    executor = make(2)
    pids = executor.start().pids
    executor._mail._call_timeout = 0.5  # pyright: ignore
    os.kill(pids[1], signal.SIGSTOP)
    with pytest.raises(EngineError, match=r"rank 1: no answer to echo within 0.5 s \(start_timeout_s\)"):
        executor.call("echo")
    with pytest.raises(EngineDead):
        executor.submit(plan(1))


def test_a_plan_that_was_lost_is_told(make: Make) -> None:
    executor = make(1)
    executor.start()
    executor.submit(plan(1)).result()
    with pytest.raises(WorkerError, match="step 3 came after step 1: a plan was lost"):
        executor.submit(plan(3)).result()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_is_told_at_once(make: Make, rank: int) -> None:
    executor = make(2)
    info = executor.start()
    waiting = executor.submit(plan(1, SLEEP, 0, 60_000))  # rank 0 has the results
    began = time.monotonic()
    os.kill(info.pids[rank], signal.SIGKILL)
    with pytest.raises(WorkerDied, match=f"rank {rank} ended with status -9"):
        waiting.result()
    executor.close()
    assert time.monotonic() - began < 2
    assert gone(info.pids)


def test_a_call_ends_with_its_worker(make: Make) -> None:
    executor = make(2)
    executor.start()
    executor.submit(plan(1, DIE, 1))
    with pytest.raises((WorkerDied, EngineDead), match="rank 1 ended with status -9"):
        executor.call("sleep", 60)


def test_a_stopped_worker_is_told_within_the_time_limit(make: Make) -> None:
    executor = make(1, step_timeout_s=0.5)
    info = executor.start()
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"rank 0: no result of step 1 within 0.5 s \(step_timeout_s\)"):
        executor.submit(plan(1, STOP)).result()
    executor.close()
    assert time.monotonic() - began < 2
    assert gone(info.pids)


def test_a_stopped_worker_does_not_block_the_engine_when_plans_fill_the_ring(make: Make) -> None:
    executor = make(2, step_timeout_s=0.5)
    info = executor.start()
    executor.submit(plan(1, STOP, 1)).result()
    with pytest.raises(EngineDead, match=r"rank 1: a plan was not read within 0.5 s"):
        executor.submit(plan(2, size=9_000_000))
    executor.close()
    assert gone(info.pids)


@pytest.mark.parametrize("what", [GARBAGE, UNASKED])
def test_garbage_from_a_worker_is_an_error_that_names_its_rank(make: Make, what: int) -> None:
    executor = make(2)
    executor.start()
    with pytest.raises(EngineError, match="rank 0 sent"):
        executor.submit(plan(1, what, 0)).result()


def test_close_does_not_wait_for_room_in_the_ring(make: Make) -> None:
    executor = make(1)
    executor.start()
    stopped = executor.submit(plan(1, STOP))
    with ThreadPoolExecutor(1) as threads:
        blocked = threads.submit(executor.submit, plan(2, size=9_000_000))
        assert settles(lambda: executor._mail._end._plans._head)  # pyright: ignore
        executor.close(0.1)
        for future in (blocked, stopped):
            with pytest.raises(EngineDead, match="the executor was closed"):
                future.result(5)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("bad@1", ModelError, "^this is no model$"),
        ("broken@1", WorkerError, "rank 1: ZeroDivisionError: unlucky"),
        ("dies@1", WorkerDied, "rank 1 ended with status -9"),
        ("hangs@1", EngineError, r"rank 1: the model was not loaded within 1.5 s \(start_timeout_s\)"),
    ],
)
def test_a_start_that_fails_on_a_rank_leaves_nothing(
    make: Make, path: str, error: type[Exception], message: str
) -> None:
    before = what_is_left()
    executor = make(2, path, start_timeout_s=1.5 if "hangs" in path else 60)
    with pytest.raises(error, match=message):
        executor.start()
    assert what_is_left() <= before
    with pytest.raises(EngineDead):
        executor.submit(plan(1))


def test_close_leaves_nothing_and_may_be_repeated(make: Make) -> None:
    before = what_is_left()
    executor = make(2)
    executor.start()
    future = executor.submit(plan(1, SLEEP, 0, 60_000))
    executor.close(0.2)
    executor.close()
    assert what_is_left() <= before
    with pytest.raises(EngineDead):
        future.result()
    for call in (executor.health, lambda: executor.submit(plan(2)), lambda: executor.call("echo")):
        with pytest.raises(EngineDead):
            call()


def test_who_waits_on_another_thread_learns_of_the_close(make: Make) -> None:
    executor = make(1)
    executor.start()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(executor.submit(plan(1, SLEEP, 0, 60_000)).result)
        executor.close(0.1)
        with pytest.raises(EngineDead):
            waiting.result(5)


def test_a_dropped_executor_ends_its_workers(make: Make) -> None:
    executor = MpExecutor(make(1)._config, "small_worker:SmallWorker")  # pyright: ignore
    pids = executor.start().pids
    del executor
    gc.collect()
    assert gone(pids)


def test_idle_workers_sleep(make: Make) -> None:
    """No thread of them wakes, not even for a moment."""
    executor = make(2)
    info = executor.start()
    executor.submit(plan(1)).result()
    executor.call("echo")
    assert settles(lambda: wakeups(info.pids))


def test_interrupted_waiting_leaves_the_executor_usable(make: Make) -> None:
    executor = make(1)
    executor.start()
    future = executor.submit(plan(1, SLEEP, 0, 500))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            future.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert future.result().step == 1
    executor.health()


def test_an_interrupted_start_does_not_wait_for_the_other_processes(make: Make) -> None:
    before, main_thread = what_is_left(), threading.get_ident()
    executor = make(20, "hangs@0", start_timeout_s=60)
    children_started = executor._launcher._children  # pyright: ignore

    def interrupt() -> None:
        while not children_started:
            time.sleep(0.001)
        signal.pthread_kill(main_thread, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        executor.start()
    interrupting.join()
    assert len(children_started) < 20
    assert what_is_left() <= before


def test_a_dropped_executor_lets_go_of_its_port_on_any_thread(make: Make) -> None:
    before = what_is_left()
    executors = [RemoteExecutor(make(2)._config, Far(1), "small_worker:SmallWorker")]  # pyright: ignore
    executors[0].start()
    dropping = threading.Thread(target=executors.clear, daemon=True)
    dropping.start()
    assert settles(lambda: -threading.active_count())
    assert what_is_left() <= before


def test_ctrl_c_in_the_terminal_is_for_the_engine_alone(make: Make) -> None:
    info = make(1).start()
    assert os.getsid(info.pids[0]) == info.pids[0]
