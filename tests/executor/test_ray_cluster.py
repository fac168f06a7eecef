"""Which Ray an engine uses: one of its own here."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import ray

from headway.config import EngineConfig, ModelConfig, ParallelConfig, RayConfig
from headway.errors import ConfigError, EngineError
from headway.executor.ray import RayExecutor
from headway.executor.ray.cluster import connection
from headway.messages import StepPlan


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ray.is_initialized()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the small worker
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def engine(executors: list[RayExecutor]) -> None:
    config = EngineConfig(
        model=ModelConfig(path="", served_model_name=""),
        parallel=ParallelConfig(executor="ray"),
        ray=RayConfig(address="local", bundles=({"CPU": 1.0},)),
    )
    executors.append(RayExecutor(config, "small_worker:SmallWorker"))
    executors[-1].start()


def test_engines_share_a_quiet_ray_that_ends_with_the_last(capfd: pytest.CaptureFixture[str]) -> None:
    executors: list[RayExecutor] = []
    for _ in range(2):
        starter = threading.Thread(target=engine, args=[executors])  # which ends, unlike what it started
        starter.start()
        starter.join()
    first, second = executors
    first.close()
    assert second.submit(StepPlan(step=3)).result(5).step == 3
    assert ray.is_initialized()
    second.close()
    assert not ray.is_initialized()
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("address", "accepted"),
    [
        ("127.0.0.1:1", "nothing answers there"),
        ("ray://127.0.0.1:1", "must be host:port"),
        ("here", "must be host:port"),
    ],
)
def test_an_address_without_ray_is_told_at_once(address: str, accepted: str) -> None:
    with pytest.raises(ConfigError, match=f"ray_address='{address}': {accepted}"):
        connection.open(address, 1)


def test_without_ray_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from headway.config import EngineConfig, ModelConfig\n"
        "from headway.executor.ray import RayExecutor\n"
        "RayExecutor(EngineConfig(model=ModelConfig(path='', served_model_name='')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("MissingDependencyError: the ray executor needs Ray: pip install 'headway[ray]'\n")


def test_a_file_that_hides_ray_is_named(tmp_path: Path) -> None:
    (tmp_path / "ray.py").touch()
    program = (
        "from headway.config import EngineConfig, ModelConfig\n"
        "from headway.executor.ray import RayExecutor\n"
        "RayExecutor(EngineConfig(model=ModelConfig(path='', served_model_name='')))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stderr.endswith(f"needs Ray, but {tmp_path / 'ray.py'} hides it: rename that file\n")


def test_a_file_that_would_hide_headway_from_rays_workers_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "headway.py").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match=f"would import {tmp_path / 'headway.py'} in the place of headway"):
        connection.open("local", 1)
