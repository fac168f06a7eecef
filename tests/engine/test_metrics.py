"""Where the time of steps goes, in numbers and as a trace."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from headway.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from headway.engine import EngineCore, launch
from headway.engine.metrics import COPY_BACK, ENGINE_PHASES, StepClock
from headway.errors import ConfigError
from headway.executor.fake import FakeExecutor, FakeModel
from headway.messages import Request, SamplingParams, StepResult

LATENCY_S = 0.02


def make_config(depth: Any = 1, trace: str | None = None) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path="", served_model_name=""),
        cache=CacheConfig(num_blocks=200),
        scheduler=SchedulerConfig(depth=depth),
        trace=trace,
    )


def make_engine(depth: Any = 1) -> EngineCore:
    config = make_config(depth)
    executor = FakeExecutor(config, FakeModel(latency_s=LATENCY_S))
    return EngineCore(config, executor, executor.start())


def run(core: EngineCore, name: str, max_tokens: int, pause_s: float = 0.0) -> None:
    sampling = SamplingParams(max_tokens=max_tokens)
    core.add(Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, max_tokens=max_tokens))
    while core.has_work():
        core.step()
        time.sleep(pause_s)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_engines_phases_are_the_time_in_which_there_was_work(depth: int) -> None:
    core = make_engine(depth)
    try:
        assert core.step() == []
        assert core.metrics().times.working == core.metrics().executor_tax == 0
        began = time.perf_counter()
        run(core, "a", max_tokens=5)
        took = time.perf_counter() - began
        time.sleep(0.1)  # nothing to do: counts as nothing
        times = core.metrics().times
    finally:
        core.close()
    assert times.steps == core.metrics().steps == 5
    assert 0.9 * took < times.working <= took
    assert sum(times.shares()[name] for name in ENGINE_PHASES) == pytest.approx(1)
    assert 5 * LATENCY_S <= times.model <= times.in_step < times.working
    assert times.wait > times.update + times.schedule
    assert times.executor_tax == pytest.approx(1 - times.in_step / times.working)


def test_a_caller_who_dawdles_is_taxed_at_depth_0_and_since_names_a_stretch_of_work() -> None:
    core = make_engine(depth=0)
    try:
        run(core, "a", max_tokens=3)
        before = core.metrics().times
        run(core, "b", max_tokens=4, pause_s=LATENCY_S)
        times = core.metrics().times.since(before)
    finally:
        core.close()
    assert times.steps == 4
    assert times.outside >= 3 * LATENCY_S
    assert 0.25 < times.executor_tax < 0.75
    assert times.in_step < 0.75 * times.working


def test_copy_back_is_what_a_result_took_after_the_workers_step() -> None:
    clock = StepClock()
    clock.begin()
    start = time.perf_counter_ns()
    time.sleep(0.01)
    end = time.perf_counter_ns()
    time.sleep(0.02)
    clock.taken(StepResult(step=0, times_ns={"start": start, "end": end}))
    times = clock.times()
    assert 0.01 <= times.wait < times.copy_back
    assert times.copy_back >= 0.02


def test_a_worker_with_another_machines_clock_has_no_copy_back() -> None:
    clock = StepClock()
    clock.begin()
    time.sleep(0.01)
    ahead = time.perf_counter_ns() + 10**12
    clock.taken(StepResult(step=0, times_ns={"start": ahead, "end": ahead + 5_000_000}))
    assert clock.times().copy_back == 0
    assert clock.times().in_step == pytest.approx(0.005)


def test_accounting_costs_a_step_next_to_nothing() -> None:
    clock, count = StepClock(), 2000
    result = StepResult(step=0, times_ns={"prepare": 1, "model": 1, "sample": 1, "start": 1, "end": 2})
    clock.begin()
    best = 1.0
    for _ in range(10):
        began = time.perf_counter()
        for _ in range(count):
            for _ in range(5):
                clock.lap(COPY_BACK)
            clock.taken(result)
        best = min(best, (time.perf_counter() - began) / count)
    assert best < 20e-6  # 2 us alone


def test_a_trace_shows_every_step_on_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    core = launch(replace(make_config(trace=str(path)), parallel=replace(make_config().parallel, executor="fake")))
    run(core, "a", max_tokens=2)
    core.close()
    core.close()
    events = json.loads(path.read_text())
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = {name: [e for e in events if e["ph"] == "X" and tracks[e["tid"]] == name] for name in tracks.values()}
    assert [e["name"] for e in spans["rank 0"] if e["name"].startswith("step")] == ["step 0", "step 1"]
    names = [e["name"] for e in spans["engine"]]
    assert {name: names.count(name) for name in ("encode", "update")} == {"encode": 2, "update": 2}
    assert set(names) <= set(ENGINE_PHASES)
    assert all(a["ts"] + a["dur"] == pytest.approx(b["ts"], abs=0.01) for a, b in pairwise(spans["engine"]))


def test_waiting_for_other_stages_is_no_work() -> None:
    clock = StepClock()
    clock.begin()
    clock.taken(StepResult(step=0, times_ns={"wait": 3_000_000, "start": 0, "end": 5_000_000}))
    assert clock.times().in_step == pytest.approx(0.002)


def test_a_trace_that_cannot_be_written_costs_no_start() -> None:
    with pytest.raises(ConfigError, match=r"trace='/absent/trace.json'"):
        launch(make_config(trace="/absent/trace.json"))
