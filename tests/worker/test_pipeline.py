"""Stages in processes of their own give what one process gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from tests.worker.driver import engine_config

from headway.config.settings import CacheConfig, EngineConfig, ParallelConfig, SchedulerConfig
from headway.engine.core import EngineCore
from headway.engine.launch import launch
from headway.errors import ConfigError
from headway.messages import EngineOutput, PoolingParams, Request, SamplingParams, StructuredOutput
from headway.ops import get_ops

VOCAB = 211
PROMPT_LENS = (40, 3, 17, 1, 25, 60, 33, 9)
VARIED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9),
    SamplingParams(temperature=1.2, top_k=20, top_p=0.9, logprobs=1),
    SamplingParams(repetition_penalty=1.3, min_p=0.05, min_tokens=5),
    SamplingParams(temperature=0, presence_penalty=1.0, frequency_penalty=0.5, logprobs=2),
    SamplingParams(temperature=0, structured=StructuredOutput(regex="even")),
    SamplingParams(temperature=0, prompt_logprobs=2),
]


class EvenMatcher:
    """Token ids that are even at even places, odd at odd ones."""

    def __init__(self) -> None:
        self._count = 0

    def mask(self) -> bytes:
        return np.packbits(np.arange(VOCAB) % 2 == self._count % 2, bitorder="little").tobytes()

    def accept(self, token_id: int) -> bool:
        fits = token_id % 2 == self._count % 2
        self._count += 1
        return fits


class EvenBackend:
    def compile(self, constraint: StructuredOutput) -> EvenMatcher:
        return EvenMatcher()


def requests() -> list[Request]:
    """Of every kind, with stop tokens that some of them meet."""
    rng = np.random.default_rng(3)
    made: list[Request] = []
    for number in range(24):
        prompt = rng.integers(3, VOCAB, PROMPT_LENS[number % len(PROMPT_LENS)]).tolist()
        request = Request(request_id=f"r{number}", prompt_token_ids=prompt)
        if number % 8 == 7:
            request.pooling = PoolingParams(normalize=True)
        else:
            request.sampling, request.max_tokens, request.seed = VARIED[number % 8], 5 + number, number
            request.stop_token_ids = [number, number + 50]
        made.append(request)
    return made


def run(core: EngineCore) -> dict[str, EngineOutput]:
    """Requests come in while others run, and one is aborted."""
    outputs: list[EngineOutput] = []
    for number, request in enumerate(requests()):
        core.add(request)
        outputs += core.step() if number % 3 else []
        outputs += core.abort(["r2"]) if number == 6 else []
    while core.has_work():
        outputs += core.step()
    assert core.metrics().preemptions > 0, "blocks are meant to be short"
    return {output.request_id: output for output in outputs if output.finish_reason != "abort"}


def configured(path: Path, stages: int, depth: Literal[0, 1], **settings: Any) -> EngineConfig:
    executor = "mp" if stages > 1 else "uni"
    return replace(
        engine_config(path, **settings),
        cache=CacheConfig(block_size=16, num_blocks=13),
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=48, depth=depth),
        parallel=ParallelConfig(executor=executor, pipeline_parallel_size=stages),
    )


@pytest.mark.parametrize(
    ("stages", "depth", "settings"),
    [
        (2, 1, {"ops": "cpu", "enforce_eager": False, "dtype": "bfloat16"}),
        (2, 0, {"ops": "reference", "dtype": "float32"}),
        (3, 1, {"ops": "cpu", "enforce_eager": False, "dtype": "float32"}),
    ],
    ids=["programs-bfloat16", "operations-depth-0", "three-programs"],
)
def test_stages_give_the_outputs_of_one_process(
    tiny_llama: tuple[Any, Path], stages: int, depth: Literal[0, 1], settings: dict[str, Any]
) -> None:
    try:
        get_ops(settings["ops"])
    except ConfigError as error:
        pytest.skip(str(error))
    found: list[dict[str, EngineOutput]] = []
    for count in (1, stages):
        core = launch(configured(tiny_llama[1], count, depth, **settings), EvenBackend)
        assert core.info.program != settings.get("enforce_eager", True)
        try:
            found.append(run(core))
        finally:
            core.close()
    alone, staged = found
    assert len(alone) == 23 and alone.keys() == staged.keys()
    for name, output in alone.items():
        assert_same(staged[name], output)


def assert_same(found: EngineOutput, expected: EngineOutput) -> None:
    """Tokens exactly. A row's logits depend on its company by a rounding: a step that pools runs without a program."""
    assert (found.token_ids, found.finish_reason) == (expected.token_ids, expected.finish_reason)
    for field in ("logprobs", "prompt_logprobs"):
        pairs = zip(getattr(found, field) or (), getattr(expected, field) or (), strict=True)
        for row, other in pairs:
            assert (row.token_ids, row.rank) == (other.token_ids, other.rank)
            assert row.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    if expected.pooled is not None:
        assert found.pooled is not None
        vector, other = (np.frombuffer(pooled, np.float32) for pooled in (found.pooled, expected.pooled))
        assert vector == pytest.approx(other, abs=1e-5)
