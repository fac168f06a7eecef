"""One small Ray for the modules that need one."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def ray_here() -> Generator[None]:
    """Two CPUs, whose workers find these tests."""
    import ray
    import ray.data

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
            object_store_memory=100 << 20,
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
