"""Tensor parallel ranks, each a process: what they generate, and that they agree."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.checkpoints import PAGED, make_checkpoint
from tests.worker import ranks as jobs
from tests.worker.driver import engine_config
from tests.worker.ranks import RankError, Ranks

from headway.config.settings import EngineConfig
from headway.messages import SamplingParams
from headway.ops.cpu.abi import find_kernels
from headway.worker import Worker

needs_kernels = pytest.mark.skipif(find_kernels() is None, reason="the kernels were not built on this machine")
PROMPTS = [[*range(5, 28)], [9], [*range(100, 114)], [77, 11, 5, 3, 2]]
GREEDY = [SamplingParams(temperature=0)] * 4
MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.9),
    SamplingParams(temperature=0.8, top_p=0.9, logprobs=3, prompt_logprobs=2),
    SamplingParams(temperature=0, repetition_penalty=1.3, logprobs=2),
]
# Two ranks own one and a half of their key/value heads each.
HALVED = {
    "gpt2": {"n_embd": 96, "n_head": 3},
    "opt-350m": {"hidden_size": 96, "num_attention_heads": 3},
    "qwen3": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16},
}
ROUNDING = 0.3  # of log probabilities


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def alone(config: EngineConfig, params: list[SamplingParams], num_tokens: int) -> Any:
    worker = Worker(config)
    worker.load()
    return jobs.generate([0, worker], PROMPTS, params, num_tokens)


@needs_kernels
@pytest.mark.parametrize(("name", "changes"), [*PAGED.items(), *HALVED.items()])
def test_every_family_generates_what_one_rank_does(name: str, changes: Any, two: Ranks, tmp_path: Path) -> None:
    path = make_checkpoint(name, "ForCausalLM", tmp_path, **changes)[1]
    program = engine_config(path, ops="cpu", enforce_eager=False)
    expected = alone(program, GREEDY, 12)
    assert two.load(program) == [True, True]
    assert two.run(jobs.generate, PROMPTS, GREEDY, 12) == [expected, expected]
    assert two.load(replace(program, device=replace(program.device, enforce_eager=True))) == [False, False]
    assert two.run(jobs.generate, PROMPTS, GREEDY, 12) == [expected, expected]


@needs_kernels
def test_ranks_of_several_threads_share_heads(two: Ranks, tmp_path: Path) -> None:
    path = make_checkpoint("qwen3", "ForCausalLM", tmp_path, **HALVED["qwen3"])[1]
    program = engine_config(path, ops="cpu", enforce_eager=False)
    expected = alone(program, GREEDY, 12)
    two.load(replace(program, device=replace(program.device, threads=2)))
    assert two.run(jobs.generate, PROMPTS, GREEDY, 12) == [expected, expected]


@needs_kernels
@pytest.mark.parametrize("eager", [False, True], ids=["program", "operations"])
def test_samples_and_log_probabilities_are_one_ranks_too(eager: bool, two: Ranks, tmp_path: Path) -> None:
    path = make_checkpoint("llama", "ForCausalLM", tmp_path, **PAGED["llama"])[1]
    config = engine_config(path, ops="cpu", enforce_eager=eager)
    expected_tokens, expected_reports = alone(config, MIXED, 12)
    two.load(replace(config, device=replace(config.device, threads=2)))
    first, second = two.run(jobs.generate, PROMPTS, MIXED, 12)
    assert first == second
    assert first[0] == expected_tokens
    for rows, expected_rows in zip(first[1], expected_reports, strict=True):
        for row, expected in zip(rows[0] + rows[1], expected_rows[0] + expected_rows[1], strict=True):
            assert row.token_ids == expected.token_ids
            assert row.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@needs_kernels
@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}])
def test_rounded_weights_give_nearly_the_same_logits(changes: Any, two: Ranks, tmp_path: Path) -> None:
    path = make_checkpoint("gpt2", "ForCausalLM", tmp_path, **HALVED["gpt2"])[1]
    config = engine_config(path, ops="cpu", enforce_eager=False, **changes)
    params = [SamplingParams(temperature=0, logprobs=100)] * len(PROMPTS)
    expected = alone(config, params, 1)[1]
    assert two.load(config) == [True, True]
    first, second = two.run(jobs.generate, PROMPTS, params, 1)
    assert first == second
    for ([row], _), ([wanted], _) in zip(first[1], expected, strict=True):
        near = dict(zip(wanted.token_ids, wanted.logprobs, strict=True))
        shared = [token for token in row.token_ids if token in near]
        assert len(shared) > 90
        found = dict(zip(row.token_ids, row.logprobs, strict=True))
        assert [found[t] for t in shared] == pytest.approx([near[t] for t in shared], abs=ROUNDING)


def test_ranks_without_kernels_use_sockets(two: Ranks, tmp_path: Path) -> None:
    config = engine_config(make_checkpoint("llama", "ForCausalLM", tmp_path)[1])
    expected = alone(config, MIXED, 8)[0]
    two.load(config)
    found = two.run(jobs.generate, PROMPTS, MIXED, 8)
    assert found[0] == found[1]
    assert found[0][0] == expected


def test_encoders(two: Ranks, tmp_path: Path) -> None:
    path = make_checkpoint("bert", "Model", tmp_path, num_attention_heads=3)[1]
    config = engine_config(path, runner="pooling", max_model_len=64)
    worker = Worker(config)
    worker.load()
    expected = jobs.embed([0, worker], PROMPTS)
    two.load(config)
    for found in two.run(jobs.embed, PROMPTS):
        for vector, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("ops", "error"),
    [pytest.param("cpu", "WorkerDied: rank 1 ended", marks=needs_kernels), ("reference", "PeerLost: another")],
)
def test_a_killed_rank_is_an_error_on_the_others(ops: str, error: str, tmp_path: Path) -> None:
    path = make_checkpoint("llama", "ForCausalLM", tmp_path, **PAGED["llama"])[1]
    ranks = Ranks(3)
    try:
        ranks.load(engine_config(path, ops=ops, enforce_eager=False))
        ranks.processes[1].kill()
        ranks.processes[1].join()
        for rank in (0, 2):
            ranks.pipes[rank].send((jobs.generate, (PROMPTS, GREEDY, 4)))
        began = time.monotonic()
        for rank in (0, 2):
            with pytest.raises(RankError, match=error):
                ranks.receive(rank)
        assert time.monotonic() - began < 20
    finally:
        ranks.close()


@needs_kernels
def test_smollm2_has_an_odd_number_of_heads(two: Ranks, smollm2_gguf: Path) -> None:
    config = engine_config(smollm2_gguf, ops="cpu", enforce_eager=False)
    expected = alone(config, GREEDY, 16)
    two.load(config)
    assert two.run(jobs.generate, PROMPTS, GREEDY, 16) == [expected, expected]


@needs_kernels
def test_ranks_that_were_given_no_memory_find_some(two: Ranks, tmp_path: Path) -> None:
    path = make_checkpoint("llama", "ForCausalLM", tmp_path, **PAGED["llama"])[1]
    config = engine_config(path, ops="cpu", enforce_eager=False)
    expected = alone(config, GREEDY, 8)
    assert two.load(config, shared=False) == [True, True]  # a program needs shared memory
    assert two.run(jobs.generate, PROMPTS, GREEDY, 8) == [expected, expected]
