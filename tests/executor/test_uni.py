"""The in-process executor with small workers on its real thread."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from headway.config import EngineConfig, ModelConfig
from headway.errors import ConfigError, EngineDead, ModelError, WorkerError
from headway.executor import WorkerInfo, make_executor
from headway.executor.uni import UniExecutor
from headway.messages import StepPlan, StepResult

CONFIG = EngineConfig(model=ModelConfig(path="", served_model_name=""))
INFO = WorkerInfo(
    executor="uni",
    num_blocks=2,
    block_size=16,
    vocab_size=0,
    threads=1,
    kernels="none",
    program=False,
    weights_bytes=0,
    kv_bytes=0,
    startup_s={},
)


class Model:
    """Stands for the weights: must not outlive the executor."""


class Worker:
    def __init__(self, config: EngineConfig) -> None:
        self.model = Model()
        self.closed = threading.Event()

    def load(self) -> WorkerInfo:
        models.append(weakref.ref(self.model))
        return INFO

    def step(self, plan: StepPlan, masks: Callable[[int], dict[int, bytes]]) -> StepResult:
        if plan.step == 13:
            raise ZeroDivisionError("unlucky")
        if plan.masked_slots:
            return StepResult(step=plan.step, tokens=masks(plan.step)[0])
        if plan.releases:
            time.sleep(plan.releases[0])
        return StepResult(step=plan.step)

    def thread_name(self) -> str:
        return threading.current_thread().name

    def fail(self) -> None:
        raise KeyError("call")

    def close(self) -> None:
        del self.model


models: list[weakref.ref[Model]] = []


def worker_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "headway-worker"]


@pytest.fixture
def executor():
    executor = UniExecutor(CONFIG, Worker)
    assert executor.start() == INFO
    yield executor
    executor.close()
    assert not worker_threads()


def test_plans_are_answered_in_order(executor: UniExecutor) -> None:
    futures = [executor.submit(StepPlan(step=step)) for step in range(5)]
    assert [future.result().step for future in futures] == [0, 1, 2, 3, 4]


def test_the_step_and_calls_run_on_one_thread_of_their_own(executor: UniExecutor) -> None:
    assert executor.call("thread_name") == ["headway-worker"]
    assert len(worker_threads()) == 1


def test_a_masked_step_waits_for_its_mask(executor: UniExecutor) -> None:
    future = executor.submit(StepPlan(step=0, masked_slots=[0]))
    with pytest.raises(TimeoutError):
        future.result(timeout=0.05)
    executor.mask(0, {0: b"\x07"})
    assert future.result().tokens == b"\x07"


def test_an_exception_in_a_step_fails_it_and_all_that_follow(executor: UniExecutor) -> None:
    slow, bad, next_ = (executor.submit(p) for p in (StepPlan(step=1), StepPlan(step=13), StepPlan(step=14)))
    assert slow.result().step == 1
    with pytest.raises(WorkerError, match="ZeroDivisionError: unlucky") as caught:
        bad.result()
    assert (caught.value.rank, caught.value.kind, caught.value.message) == (0, "ZeroDivisionError", "unlucky")
    assert 'raise ZeroDivisionError("unlucky")' in caught.value.remote_traceback
    with pytest.raises(WorkerError, match="unlucky"):
        next_.result()
    with pytest.raises(EngineDead, match="unlucky"):
        executor.submit(StepPlan(step=15))
    with pytest.raises(WorkerError, match="unlucky"):
        executor.health()


def test_an_exception_in_a_call_costs_only_that_call(executor: UniExecutor) -> None:
    with pytest.raises(WorkerError, match="KeyError"):
        executor.call("fail")
    executor.health()
    assert executor.submit(StepPlan(step=0)).result().step == 0


def test_a_call_that_times_out_desynchronises_nothing(executor: UniExecutor) -> None:
    slow = executor.submit(StepPlan(step=0, releases=[1]))
    with pytest.raises(TimeoutError):
        executor.call("thread_name", timeout=0.01)
    assert slow.result().step == 0
    assert executor.submit(StepPlan(step=1)).result().step == 1


@pytest.mark.parametrize("error", [ModelError("no such file"), RuntimeError("out of memory")])
@pytest.mark.parametrize("where", ["construct", "load"])
def test_an_error_at_start_reaches_the_caller_and_leaves_no_thread(error: Exception, where: str) -> None:
    class Bad(Worker):
        def __init__(self, config: EngineConfig) -> None:
            super().__init__(config)
            if where == "construct":
                raise error

        def load(self) -> WorkerInfo:
            raise error

    executor = UniExecutor(CONFIG, Bad)
    with pytest.raises(ModelError if isinstance(error, ModelError) else WorkerError, match=str(error)):
        executor.start()
    assert not worker_threads()
    executor.close()


def test_closing_twice_leaves_no_thread_and_no_model() -> None:
    executor = UniExecutor(CONFIG, Worker)
    executor.start()
    executor.submit(StepPlan(step=0)).result()
    model = models[-1]
    executor.close()
    executor.close()
    gc.collect()
    assert model() is None and not worker_threads()
    with pytest.raises(EngineDead):
        executor.submit(StepPlan(step=1))
    with pytest.raises(EngineDead):
        executor.health()


def test_closing_ends_a_step_that_waits_for_a_mask_and_jobs_behind_it() -> None:
    executor = UniExecutor(CONFIG, Worker)
    executor.start()
    futures: list[Future[StepResult]] = [
        executor.submit(StepPlan(step=0, masked_slots=[0])),
        executor.submit(StepPlan(step=1)),
    ]
    executor.close()
    for future in futures:
        with pytest.raises(EngineDead):
            future.result(timeout=1)


def test_closing_after_a_failure_drops_the_model() -> None:
    executor = UniExecutor(CONFIG, Worker)
    executor.start()
    with pytest.raises(WorkerError):
        executor.submit(StepPlan(step=13)).result()
    executor.close()
    gc.collect()
    assert models[-1]() is None and not worker_threads()


def test_an_executor_that_is_dropped_ends_its_thread() -> None:
    executor = UniExecutor(CONFIG, Worker)
    executor.start()
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None and models[-1]() is None and not worker_threads()


def test_ctrl_c_interrupts_a_wait(executor: UniExecutor) -> None:
    future = executor.submit(StepPlan(step=0, releases=[2]))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        future.result()
    assert time.monotonic() - start < 1.5
    timer.join()
    assert future.result().step == 0


INTERRUPTED_CLOSE = """
import os, signal, threading
from tests.executor.test_uni import CONFIG, Worker
from headway.executor.uni import UniExecutor
from headway.messages import StepPlan

stepping = threading.Event()

class Loud(Worker):
    def step(self, plan, masks):
        stepping.set()
        return super().step(plan, masks)

    def close(self):
        os.write(1, b"closed")

executor = UniExecutor(CONFIG, Loud)
executor.start()
executor.submit(StepPlan(step=0, releases=[1]))
stepping.wait()
threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
try:
    executor.close()
except KeyboardInterrupt:
    os.write(1, b"interrupted ")
"""


def test_an_interrupted_close_is_finished_at_exit() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_CLOSE], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted closed", "", 0)


INTERRUPTED_LOAD = """
import os, signal, threading, time
from tests.executor.test_uni import CONFIG, Worker
from headway.executor.uni import UniExecutor

class Slow(Worker):
    def load(self):
        threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
        time.sleep(6)
        return super().load()

try:
    UniExecutor(CONFIG, Slow).start()
except KeyboardInterrupt:
    os.write(1, b"interrupted")
"""


def test_an_interrupted_start_is_an_interrupt() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_LOAD], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted", "", 0)


def test_an_unknown_executor_is_named() -> None:
    from dataclasses import replace

    for name in ("carrier-pigeon", "headway.nothing:Here", "json:JSONDecoder"):
        config = replace(CONFIG, parallel=replace(CONFIG.parallel, executor=name))
        with pytest.raises(ConfigError, match=name):
            make_executor(config)
