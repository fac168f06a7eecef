"""Sampling against a naive float64 reference, one row at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.worker.plans import plan, start

from headway.messages import SamplingParams, StructuredOutput
from headway.worker.batch import Batch
from headway.worker.sampler import Sampler, uniform

WORD = (1 << 64) - 1
BLURRED = 1e-5  # how near to a boundary float32 arithmetic may decide otherwise


def mix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def sample(
    logits: np.ndarray, params: list[SamplingParams], *, seeds=None, outputs=None, masks=None, **extra
) -> list[int]:
    """One token per row of logits, each from a fresh slot whose prompt is token 0."""
    rows, vocab = logits.shape
    outputs = outputs or [[] for _ in params]
    batch = Batch(rows, 64, 16, vocab)
    starts = [
        start(i, [0, *out], sampling=p, prompt_len=1, seed=0 if seeds is None else seeds[i], **extra)
        for i, (p, out) in enumerate(zip(params, outputs, strict=True))
    ]
    runs = batch.apply(plan(starts=starts, runs=[(i, 1 + len(outputs[i])) for i in range(rows)]))
    before = logits.copy()
    Sampler(vocab).sample(logits, batch, runs.slots, masks or {})
    assert (logits == before).all()
    return [int(batch.tokens[i, batch.length[i]]) for i in range(rows)]


def reference_weights(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, float]:
    """Float64 weights after every filter, and how near the nucleus came to a different cut (relative mass)."""
    scaled = logits.astype(np.float64) / params.temperature
    weights = np.exp(scaled - scaled.max())
    if params.top_k > 0:
        weights[logits < np.sort(logits)[::-1][min(params.top_k, len(logits)) - 1]] = 0
    margin = 1.0
    if params.top_p < 1:
        ordered = np.sort(weights)[::-1]
        cumulative = ordered.cumsum() / ordered.sum()
        margin = float(np.abs(cumulative - params.top_p).min())
        weights[weights < ordered[int(np.searchsorted(cumulative, params.top_p))] * (1 - 1e-9)] = 0
    if params.min_p > 0:
        margin = min(margin, float(np.abs(weights[weights < 1] - params.min_p).min(initial=1.0)))
        weights[weights < params.min_p] = 0
    return weights, margin


@st.composite
def rows(draw: st.DrawFn) -> tuple[np.ndarray, SamplingParams, int]:
    vocab = draw(st.sampled_from([1, 2, 50, 257, 5000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = (rng.standard_normal(vocab) * draw(st.sampled_from([0.01, 1.0, 5.0]))).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.1, 0.7, 1.0, 3.0])),
        top_k=draw(st.sampled_from([0, -1, 1, 5, 64, 100, 10000])),
        top_p=draw(st.sampled_from([1.0, 0.99, 0.9, 0.5, 1e-6])),
        min_p=draw(st.sampled_from([0.0, 0.02, 0.5, 1.0])),
    )
    return logits, params, draw(st.integers(0, WORD))


@settings(max_examples=300, deadline=None)
@given(rows())
def test_a_token_inverts_the_reference_distribution(row: tuple[np.ndarray, SamplingParams, int]) -> None:
    logits, params, seed = row
    [token] = sample(logits[None], [params], seeds=[seed])
    weights, margin = reference_weights(logits, params)
    if margin < BLURRED:
        return
    assert weights[token] > 0
    cumulative = weights.cumsum() / weights.sum()
    u = (mix(seed ^ mix(0)) >> 40) * 2.0**-24
    before = cumulative[token - 1] if token else 0.0
    assert before - BLURRED <= u <= cumulative[token] + BLURRED


@given(st.lists(st.tuples(st.integers(0, WORD), st.integers(0, 1 << 20)), min_size=1))
def test_the_uniform_is_the_documented_function_of_seed_and_index(pairs: list[tuple[int, int]]) -> None:
    seeds, indices = zip(*pairs, strict=True)
    got = uniform(np.array(seeds, np.uint64), np.array(indices, np.int32))
    assert got.tolist() == [(mix(s ^ mix(n)) >> 40) / 2**24 for s, n in pairs]


def test_uniforms_of_one_seed_and_of_neighbouring_seeds_look_independent() -> None:
    counts = 1000
    grid = np.array(
        [uniform(np.full(counts, seed, np.uint64), np.arange(counts, dtype=np.int32)) for seed in range(50)]
    )
    assert abs(grid.mean() - 0.5) < 0.005
    assert abs(grid.var() - 1 / 12) < 0.002
    assert np.abs(np.corrcoef(grid)[np.triu_indices(50, 1)]).max() < 0.15
    assert np.abs(np.corrcoef(grid.T[:50])[np.triu_indices(50, 1)]).max() < 0.7


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_row_is_sampled_alike_in_any_company(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    logits = (rng.standard_normal((8, 3000)) * 3).astype(np.float32)
    choices = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.8, 1.5]),
        top_k=st.sampled_from([0, 10, 500]),
        top_p=st.sampled_from([1.0, 0.95]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
    )
    params = data.draw(st.lists(choices, min_size=8, max_size=8))
    seeds = rng.integers(0, WORD, 8, dtype=np.uint64).tolist()
    together = sample(logits, params, seeds=seeds)
    order = data.draw(st.permutations(range(8)))
    permuted = sample(logits[order], [params[i] for i in order], seeds=[seeds[i] for i in order])
    alone = [sample(logits[i : i + 1], [params[i]], seeds=[seeds[i]])[0] for i in range(8)]
    assert together == alone
    assert permuted == [together[i] for i in order]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([[0, 2, 2, 1], [3, 3, 3, 3]], np.float32)
    greedy = SamplingParams(temperature=0)
    assert sample(logits, [greedy, greedy]) == [1, 0]
    assert sample(logits, [SamplingParams(temperature=0, logprobs=1), greedy]) == [1, 0]


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_filters_leave_the_most_likely_token(params: dict) -> None:
    logits = np.random.default_rng(0).standard_normal((20, 4096)).astype(np.float32)
    tokens = sample(logits, [SamplingParams(**params)] * 20, seeds=list(range(20)))
    assert tokens == logits.argmax(1).tolist()


def test_a_flat_nucleus_keeps_more_than_a_partial_sort_covers() -> None:
    """20000 equally likely tokens and 20000 a million times less so: any of the former may come, none of the latter."""
    logits = np.zeros((200, 40000), np.float32)
    logits[:, ::2] = -14
    tokens = sample(logits, [SamplingParams(top_p=0.9)] * 200, seeds=list(range(200)))
    assert all(t % 2 for t in tokens)
    assert max(tokens) > 36000
    assert min(tokens) < 4000


def test_logit_bias_moves_the_choice() -> None:
    logits = np.array([[1, 2, 3, 4]], np.float32)
    assert sample(logits, [SamplingParams(temperature=0, logit_bias={1: 5.0, 3: -1.0})]) == [1]


def test_bad_words_never_complete() -> None:
    logits = np.array([[1, 2, 3, 4]], np.float32)
    greedy = [SamplingParams(temperature=0)]
    assert sample(logits, greedy, bad_words_ids=[[3]]) == [2]
    assert sample(logits, greedy, bad_words_ids=[[2, 3]]) == [3]
    assert sample(logits, greedy, bad_words_ids=[[2, 3]], outputs=[[2]]) == [2]
    assert sample(logits, greedy, bad_words_ids=[[1, 2, 3]], outputs=[[2]]) == [3]
    assert sample(logits, greedy, bad_words_ids=[[0, 3]]) == [3], "the prompt is not the text that is written"


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = np.array([[1, 2, 3, 4]], np.float32)
    params = [SamplingParams(temperature=0, min_tokens=2)]
    assert sample(logits, params, stop_token_ids=[3, 2]) == [1]
    assert sample(logits, params, stop_token_ids=[3, 2], outputs=[[0]]) == [1]
    assert sample(logits, params, stop_token_ids=[3, 2], outputs=[[0, 0]]) == [3]


def test_a_mask_allows_only_its_bits() -> None:
    logits = np.arange(40, dtype=np.float32)[None]
    params = [SamplingParams(temperature=0, structured=StructuredOutput(regex="a"))]
    mask = (1 << 5 | 1 << 33).to_bytes(8, "little")
    assert sample(logits, params, masks={0: mask}) == [33]
    assert sample(logits, params, masks={0: mask[:4]}) == [5], "ids beyond the mask are forbidden"
    sampled = [SamplingParams(temperature=100, structured=StructuredOutput(regex="a"))] * 50
    tokens = sample(np.repeat(logits, 50, 0), sampled, seeds=list(range(50)), masks=dict.fromkeys(range(50), mask))
    assert set(tokens) == {5, 33}


def test_a_mask_that_allows_nothing_still_yields_a_token() -> None:
    logits = np.arange(40, dtype=np.float32)[None]
    params = [SamplingParams(structured=StructuredOutput(regex="a"))]
    assert sample(logits, params, masks={0: bytes(8)}) == [0]


@settings(max_examples=100, deadline=None)
@given(
    output=st.lists(st.integers(0, 9), max_size=20),
    repetition=st.sampled_from([1.0, 0.7, 1.3]),
    presence=st.sampled_from([0.0, 1.5, -2.0]),
    frequency=st.sampled_from([0.0, 0.3, -0.5]),
    seed=st.integers(0, 1000),
)
def test_penalties_agree_with_the_naive_rule(
    output: list[int], repetition: float, presence: float, frequency: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).standard_normal((1, 10)).astype(np.float32)
    params = SamplingParams(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    expected = logits[0].astype(np.float64)
    for token in {0, *output}:
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token in output:
        expected[token] -= frequency
    for token in set(output):
        expected[token] -= presence
    [token] = sample(logits, [params], outputs=[output])
    assert expected[token] >= expected.max() - 1e-5


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 60), st.booleans())
def test_logprobs_are_of_the_raw_logits(seed: int, count: int, ties: bool) -> None:
    logits = (np.random.default_rng(seed).standard_normal((1, 50)) * 4).astype(np.float32)
    if ties:
        logits = np.round(logits)
    batch = Batch(1, 8, 4, 50)
    params = SamplingParams(temperature=0, logprobs=count, repetition_penalty=50.0, logit_bias={7: 90.0})
    runs = batch.apply(plan(starts=[start(0, [0], sampling=params)], runs=[(0, 1)]))
    row = Sampler(50).sample(logits, batch, runs.slots, {})[0]
    exact = logits[0].astype(np.float64)
    exact -= math.log(np.exp(exact).sum())
    order = sorted(range(50), key=lambda t: (-exact[t], t))
    assert row.token_ids == [7, *order[:count]]
    assert row.logprobs == pytest.approx([exact[t] for t in row.token_ids], abs=1e-5)
    assert row.rank == 1 + sum(e > exact[7] for e in exact)
