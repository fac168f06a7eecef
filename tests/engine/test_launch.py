from __future__ import annotations

from headway.config import CacheConfig, Choice, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from headway.engine import launch


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
