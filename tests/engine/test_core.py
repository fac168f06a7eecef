"""The loop's own behaviour: overlap, failure, interruption, structured output that cannot go on."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from concurrent.futures import Future
from typing import Any

import pytest

from headway.config import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from headway.engine import EngineCore, launch
from headway.errors import EngineDead, RequestError, WorkerError
from headway.executor.fake import FakeExecutor, FakeModel
from headway.messages import EngineOutput, Request, SamplingParams, StepPlan, StepResult, StructuredOutput


def make_config(depth: Any = 1, **model: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(path="", served_model_name="", **model),
        cache=CacheConfig(num_blocks=200),
        scheduler=SchedulerConfig(depth=depth),
        parallel=ParallelConfig(executor="fake"),
    )


def make_engine(model: FakeModel | None = None, grammar: Any = None, depth: Any = 1) -> EngineCore:
    config = make_config(depth)
    executor = FakeExecutor(config, model)
    return EngineCore(config, executor, executor.start(), grammar)


def make_request(name: str = "a", max_tokens: int = 4, **fields: Any) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, structured=fields.pop("structured", None))
    return Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling, max_tokens=max_tokens, **fields)


def drain(core: EngineCore) -> list[EngineOutput]:
    outputs: list[EngineOutput] = []
    while core.has_work():
        outputs += core.step()
    return outputs


@pytest.mark.parametrize("depth", [0, 1])
def test_depth_is_the_number_of_steps_submitted_ahead(depth: int) -> None:
    core = make_engine(depth=depth)
    core.add(make_request(max_tokens=10))
    core.step()
    assert core.stats().steps - 1 == depth
    core.close()


def test_launch_takes_the_number_of_blocks_from_the_worker() -> None:
    config = EngineConfig(model=ModelConfig(path="", served_model_name=""), parallel=ParallelConfig(executor="fake"))
    core = launch(config)
    assert core.config.cache.num_blocks == core.info.num_blocks > 0
    core.add(make_request())
    (output,) = drain(core)
    assert output.finish_reason == "length" and len(output.token_ids) == 4
    stats = core.stats()
    assert (stats.prompt_tokens, stats.generated_tokens, stats.blocks_used) == (3, 4, 0)
    core.close()


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_step_raises_once_and_leaves_the_engine_dead(depth: int) -> None:
    core = make_engine(FakeModel(fail_at_step=2), depth=depth)
    core.add(make_request(max_tokens=20))
    with pytest.raises(WorkerError, match="injected at step 2"):
        drain(core)
    assert not core.has_work()
    for call in (core.step, lambda: core.add(make_request("b")), lambda: core.abort(["a"])):
        with pytest.raises(EngineDead, match="injected"):
            call()
    core.close()
    core.close()


def test_closing_with_steps_in_flight_leaves_no_thread() -> None:
    core = make_engine()
    core.add(make_request(max_tokens=20))
    core.step()
    core.close()
    assert "headway-worker" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(EngineDead, match="closed"):
        core.step()


def test_ctrl_c_in_a_step_loses_nothing() -> None:
    core = make_engine(FakeModel(latency_s=0.3))
    core.add(make_request())
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        core.step()
    timer.join()
    (output,) = drain(core)
    assert len(output.token_ids) == 4
    core.close()


class Interrupted(FakeExecutor):
    def submit(self, plan: StepPlan) -> Future[StepResult]:
        if plan.step == 1:
            raise KeyboardInterrupt
        return super().submit(plan)


def test_ctrl_c_between_a_plan_and_its_submission_is_the_engines_end() -> None:
    config = make_config(depth=1)
    executor = Interrupted(config)
    core = EngineCore(config, executor, executor.start())
    core.add(make_request())
    with pytest.raises(KeyboardInterrupt):
        core.step()
    assert not core.has_work()
    with pytest.raises(EngineDead, match="KeyboardInterrupt"):
        core.step()
    core.close()


class ShortMatcher:
    """Goes on for two tokens, then fails as ``how`` says."""

    def __init__(self, how: str) -> None:
        self.how, self.count = how, 0

    def mask(self) -> bytes:
        if self.how == "mask" and self.count == 2:
            raise RequestError("structured.regex", "x", "too complex to go on")
        return b"\xff" * 32

    def accept(self, token_id: int) -> bool:
        self.count += 1
        return self.how != "accept" or self.count < 3


class Recorder(FakeExecutor):
    """Keeps the masks that steps got."""

    masks: list[dict[int, bytes]]

    def mask(self, step: int, masks: dict[int, bytes]) -> None:
        self.masks.append(masks)
        super().mask(step, masks)


class OnlyBackend:
    """Allows token 7 alone."""

    def compile(self, constraint: StructuredOutput) -> OnlyBackend:
        return self

    def mask(self) -> bytes:
        return bytes([1 << 7]) + bytes(31)

    def accept(self, token_id: int) -> bool:
        return token_id == 7


def test_a_planned_step_masks_nothing_for_a_request_that_ended_meanwhile() -> None:
    config = make_config(depth=1)
    executor = Recorder(config, FakeModel(vocab_size=250))
    executor.masks = []
    core = EngineCore(config, executor, executor.start(), OnlyBackend())
    for name in ("stops", "goes on"):
        core.add(make_request(name, 3, structured=StructuredOutput(regex="x"), stop_token_ids=[7] * (name == "stops")))
    outputs = {output.request_id: output for output in drain(core)}
    assert outputs["stops"].token_ids == [7] and outputs["goes on"].token_ids == [7, 7, 7]
    only, ones = OnlyBackend().mask(), b"\xff" * 32
    assert [sorted(masks.values()) for masks in executor.masks] == [[only, only], [only, ones], [only]]
    core.close()


class ShortBackend:
    def compile(self, constraint: StructuredOutput) -> ShortMatcher:
        assert constraint.regex is not None
        return ShortMatcher(constraint.regex)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("how", "message"), [("mask", "too complex"), ("accept", "does not fit the constraint")])
def test_a_constraint_that_cannot_go_on_ends_its_request_only(how: str, message: str, depth: int) -> None:
    core = make_engine(grammar=ShortBackend(), depth=depth)
    core.add(make_request("bad", 8, structured=StructuredOutput(regex=how)))
    core.add(make_request("good", 8, structured=StructuredOutput(regex="fine")))
    core.add(make_request("free", 8))
    outputs = {output.request_id: output for output in drain(core)}
    assert outputs["bad"].finish_reason == "error" and message in (outputs["bad"].error or "")
    assert outputs["good"].finish_reason == outputs["free"].finish_reason == "length"
    core.close()


def test_structured_output_without_a_library_is_refused() -> None:
    core = make_engine()
    with pytest.raises(RequestError, match=r"headway\[grammar\]"):
        core.add(make_request(structured=StructuredOutput(regex="a")))
    assert not core.has_work()
    core.close()


def test_threads_hand_over_sooner_while_an_engine_runs() -> None:
    usual = sys.getswitchinterval()
    first, second = make_engine(), make_engine()
    assert sys.getswitchinterval() < usual
    first.close()
    first.close()
    assert sys.getswitchinterval() < usual
    second.close()
    assert sys.getswitchinterval() == usual


def test_an_engine_that_is_dropped_leaves_the_interval_as_it_was() -> None:
    usual = sys.getswitchinterval()
    core = make_engine()
    del core
    gc.collect()
    assert sys.getswitchinterval() == usual
