"""Prometheus metrics, under the names that dashboards of other engines have, after ``headway:``.

A scrape reaches one process and means all of them, so they share their numbers: see Board.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import get_args

import numpy as np
import numpy.typing as npt
from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headway.engine import EngineMetrics
from headway.engine.port import EngineClient
from headway.llm import AsyncLLM
from headway.messages import RequestOutput
from headway.messages.outputs import FinishReason

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_REASONS: tuple[str, ...] = get_args(FinishReason)

Array = npt.NDArray[np.float64]


class _Histogram:
    """A view of its part of an array: counts of each bucket and of what is above, then the sum."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self.bounds = name, text, bounds
        self.size = len(bounds) + 2

    def observe(self, part: Array, value: float, count: int = 1) -> None:
        part[bisect_left(self.bounds, value)] += count
        part[-1] += value * count

    def family(self, part: Array, labels: dict[str, str]) -> Metric:
        bounds = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        family = HistogramMetricFamily(self.name, self.text, labels=list(labels))
        family.add_metric(list(labels.values()), list(zip(bounds, np.cumsum(part[:-1]).tolist())), float(part[-1]))
        return family


TTFT = _Histogram("headway:time_to_first_token_seconds", "From a stream's request to its first token.", _SECONDS)
ITL = _Histogram("headway:inter_token_latency_seconds", "From a token of a stream to its next one.", _SECONDS)
E2E = _Histogram("headway:e2e_request_latency_seconds", "From a request's arrival to its end.", _SECONDS)
PROMPT = _Histogram("headway:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
GENERATED = _Histogram("headway:request_generation_tokens", "Generated tokens of a request.", _TOKENS)
_HISTOGRAMS = (TTFT, ITL, E2E, PROMPT, GENERATED)
_SIZE = sum(h.size for h in _HISTOGRAMS) + len(_REASONS)

_Table = dict[str, tuple[str, Callable[[EngineMetrics], float]]]
_GAUGES: _Table = {
    "headway:num_requests_running": ("Requests in the batch.", lambda m: m.running),
    "headway:num_requests_waiting": ("Requests that wait for a place in the batch.", lambda m: m.waiting),
    "headway:kv_cache_usage_perc": ("KV cache in use; 1 is full.", lambda m: m.blocks_used / (m.blocks_total or 1)),
}
_COUNTERS: _Table = {
    "headway:prompt_tokens": ("Prompt tokens of admitted requests.", lambda m: m.prompt_tokens),
    "headway:generation_tokens": ("Tokens generated.", lambda m: m.generated_tokens),
    "headway:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda m: m.prompt_tokens),
    "headway:prefix_cache_hits": ("Prompt tokens found in the prefix cache.", lambda m: m.prefix_hit_tokens),
    "headway:num_preemptions": ("Requests that lost their KV cache to others.", lambda m: m.preemptions),
}
_ENGINE = [read for _, read in (*_GAUGES.values(), *_COUNTERS.values())]


class Board:
    """A row of numbers for each front end of a server and for each of its engines.

    One process writes each row, and all read them. What a front end counted stays when it has ended. unfinished: how
    many requests each front end has; requests: what it has seen of all, for RequestStats.
    """

    def __init__(self, front_ends: int, engines: int, fd: int | None = None) -> None:
        """fd: of a file (without a name) that all of them map; None: there is only this process."""
        cut = front_ends * (_SIZE + 1)
        count = cut + engines * (1 + len(_ENGINE))
        if fd is None:
            numbers = np.zeros(count)
        else:
            os.ftruncate(fd, count * 8)
            numbers = np.frombuffer(mmap.mmap(fd, count * 8), np.float64)
        requests, self._engines = numbers[:cut].reshape(front_ends, -1), numbers[cut:].reshape(engines, -1)
        self.requests, self.unfinished = requests[:, :-1], requests[:, -1]

    def look(self, llm: AsyncLLM | EngineClient) -> None:
        """Writes the engines' rows."""
        self._engines[:] = [
            [health.up, *(read(metrics) for read in _ENGINE)]
            for health, metrics in zip(llm.health(), llm.replica_metrics())
        ]

    def collect(self, labels: dict[str, str]) -> Iterator[Metric]:
        up = ("headway:engine_up", "Whether the engine runs.")
        gauges, counters = ([(name, text) for name, (text, _) in table.items()] for table in (_GAUGES, _COUNTERS))
        families: list[GaugeMetricFamily | CounterMetricFamily] = [
            *(GaugeMetricFamily(*one, labels=[*labels, "engine"]) for one in (up, *gauges)),
            *(CounterMetricFamily(*one, labels=[*labels, "engine"]) for one in counters),
        ]
        for family, values in zip(families, self._engines.T.tolist()):
            for engine, value in enumerate(values):
                family.add_metric([*labels.values(), str(engine)], value)
        yield from families
        total = self.requests.sum(axis=0)
        for histogram, part in zip(_HISTOGRAMS, _split(total)):
            yield histogram.family(part, labels)
        ended = CounterMetricFamily(
            "headway:request_success", "Requests that ended.", labels=[*labels, "finished_reason"]
        )
        for reason, count in zip(_REASONS, total[-len(_REASONS) :].tolist()):
            ended.add_metric([*labels.values(), reason], count)
        yield ended


class RequestStats:
    """What a front end has seen of requests: own is its row of Board.requests. One thread writes."""

    def __init__(self, own: Array) -> None:
        self._parts, self._reasons = dict(zip(_HISTOGRAMS, _split(own))), own[-len(_REASONS) :]

    def observe(self, histogram: _Histogram, value: float, count: int = 1) -> None:
        histogram.observe(self._parts[histogram], value, count)

    def ended(self, reason: str) -> None:
        self._reasons[_REASONS.index(reason)] += 1

    @contextmanager
    def watch(self, stream: bool) -> Generator[Callable[[RequestOutput], None]]:
        """For one prompt: what it gives is to be called with each of its outputs. stream: they come as tokens do."""
        start, generated, finished = perf_counter(), 0, False
        last: dict[int, float] = {}  # of each sample

        def see(output: RequestOutput) -> None:
            nonlocal generated, finished
            now = perf_counter()
            for one in output.outputs:
                new = len(one.token_ids)
                generated += new
                if stream and new:
                    if one.index in last:
                        self.observe(ITL, (now - last[one.index]) / new, new)
                    elif not last:
                        self.observe(TTFT, now - start)
                    last[one.index] = now
                if one.finish_reason is not None:
                    self.ended(one.finish_reason)
            finished = output.finished
            if finished:
                self.observe(E2E, now - start)
                self.observe(PROMPT, len(output.prompt_token_ids))
                self.observe(GENERATED, generated)

        try:
            yield see
        except asyncio.CancelledError:
            if not finished:
                self.ended("abort")
            raise


def _split(array: Array) -> list[Array]:
    ends = np.cumsum([h.size for h in _HISTOGRAMS]).tolist()
    return np.split(array[: ends[-1]], ends[:-1])


def exposition(model: str, board: Board) -> bytes:
    """Prometheus' text format."""

    class All(Collector):
        def collect(self) -> Iterator[Metric]:
            return board.collect({"model_name": model})

    return generate_latest(All())
