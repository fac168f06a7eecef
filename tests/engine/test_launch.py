from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar, NoReturn

import pytest

from headway.config import CacheConfig, Choice, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from headway.engine import launch
from headway.engine.grammar import GrammarBackend
from headway.errors import ConfigError
from headway.executor import WorkerInfo
from headway.executor.uni import UniExecutor
from headway.messages import StepPlan


def test_the_engine_says_where_its_steps_run_and_why() -> None:
    config = EngineConfig(
        model=ModelConfig(path="m", served_model_name="m"),
        cache=CacheConfig(num_blocks=512),
        scheduler=SchedulerConfig(depth=1),
        parallel=ParallelConfig(executor="fake", pipeline_parallel_size=2),
        choices=(Choice(name="distributed_executor_backend", value="fake", reason="a test"),),
    )
    core = launch(config)
    try:
        assert (core.info.executor, core.info.reason, core.info.ranks, core.info.depth) == ("fake", "a test", 2, 1)
        assert str(core.info) == "executor fake (a test): 2 ranks of 1 thread, kernels fake, depth 1"
    finally:
        core.close()


@pytest.mark.parametrize("executor", ["fake", "absent"])
def test_a_failed_start_leaves_nothing(executor: str, tmp_path: Path) -> None:
    def broken() -> GrammarBackend:
        raise ZeroDivisionError

    config = EngineConfig(
        model=ModelConfig(path="", served_model_name=""),
        parallel=ParallelConfig(executor=executor),
        trace=str(tmp_path / "trace.json"),
    )
    before = len(os.listdir("/proc/self/fd")), threading.active_count(), sys.getswitchinterval()
    with pytest.raises(ConfigError if executor == "absent" else ZeroDivisionError):
        launch(config, broken)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count(), sys.getswitchinterval()) == before


class Loads:
    """A worker that is interrupted while it loads, and does not notice."""

    begun, heard, ended = threading.Event(), threading.Event(), threading.Event()

    def __init__(self, config: EngineConfig) -> None:
        pass

    def load(self) -> WorkerInfo:
        assert self.begun.wait(20)
        while not self.heard.wait(0.05):  # a signal just before a wait begins does not end it
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert self.ended.wait(20)
        raise ZeroDivisionError

    def step(self, plan: StepPlan, masks: object) -> NoReturn:
        raise AssertionError

    def close(self) -> None:
        pass


class Impatient(UniExecutor):
    made: ClassVar[list[UniExecutor]] = []  # one that is dropped waits for its thread

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, Loads)
        self.made.append(self)

    def begin(self) -> Future[WorkerInfo]:
        future = super().begin()
        Loads.begun.set()
        return future

    def close(self, timeout: float = 0.05) -> None:
        Loads.heard.set()
        super().close(timeout)


def test_ctrl_c_while_the_model_loads_is_that() -> None:
    config = EngineConfig(
        model=ModelConfig(path="", served_model_name=""), parallel=ParallelConfig(executor=f"{__name__}:Impatient")
    )
    try:
        with pytest.raises(KeyboardInterrupt):
            launch(config)
    finally:
        Loads.ended.set()
        Impatient.made.clear()
