from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from headway.config import CacheConfig, Choice, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from headway.engine import launch
from headway.engine.grammar import GrammarBackend
from headway.errors import ConfigError


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
