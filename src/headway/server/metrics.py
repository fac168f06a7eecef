"""Prometheus metrics, under the names that dashboards of other engines have, after ``headway:``.

What front ends see of requests is one array of numbers a process. With several of them each array is a file in a
directory that they share, and whichever is asked adds them up: a scrape reaches one process, and means all.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from pathlib import Path
from time import perf_counter
from typing import get_args

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from headway.engine import EngineMetrics
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


TTFT = _Histogram("headway:time_to_first_token_seconds", "From a request's arrival to its first token.", _SECONDS)
ITL = _Histogram("headway:inter_token_latency_seconds", "From a token of a stream to its next one.", _SECONDS)
E2E = _Histogram("headway:e2e_request_latency_seconds", "From a request's arrival to its end.", _SECONDS)
PROMPT = _Histogram("headway:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
GENERATED = _Histogram("headway:request_generation_tokens", "Generated tokens of a request.", _TOKENS)
_HISTOGRAMS = (TTFT, ITL, E2E, PROMPT, GENERATED)
_SIZE = sum(h.size for h in _HISTOGRAMS) + len(_REASONS)


class RequestStats:
    """What this process has seen of requests, and all that share its directory. One thread writes."""

    def __init__(self, shared: Path | None = None) -> None:
        """shared: a directory; what ended processes have left there counts on."""
        self._shared = shared
        self._array = np.zeros(_SIZE) if shared is None else _mapped(shared / f"{os.getpid()}.stats")
        self._parts = dict(zip(_HISTOGRAMS, _split(self._array)))
        self._reasons = self._array[-len(_REASONS) :]

    def observe(self, histogram: _Histogram, value: float, count: int = 1) -> None:
        histogram.observe(self._parts[histogram], value, count)

    def ended(self, reason: str) -> None:
        self._reasons[_REASONS.index(reason)] += 1

    async def watch(self, outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs, counted."""
        start = last = perf_counter()
        generated = 0
        async with aclosing(outputs):
            async for output in outputs:
                now, new = perf_counter(), sum([len(one.token_ids) for one in output.outputs])
                if new and not generated:
                    self.observe(TTFT, now - start)
                elif new:
                    self.observe(ITL, (now - last) / new, new)
                generated, last = generated + new, now
                for one in output.outputs:
                    if one.finish_reason is not None:
                        self.ended(one.finish_reason)
                if output.finished:
                    self.observe(E2E, now - start)
                    self.observe(PROMPT, len(output.prompt_token_ids))
                    self.observe(GENERATED, generated)
                yield output

    def collect(self, labels: dict[str, str]) -> Iterator[Metric]:
        total = self._total()
        for histogram, part in zip(_HISTOGRAMS, _split(total)):
            yield histogram.family(part, labels)
        ended = CounterMetricFamily(
            "headway:request_success", "Requests that ended.", labels=[*labels, "finished_reason"]
        )
        for reason, count in zip(_REASONS, total[-len(_REASONS) :].tolist()):
            ended.add_metric([*labels.values(), reason], count)
        yield ended

    def _total(self) -> Array:
        if self._shared is None:
            return self._array
        return np.sum([np.fromfile(path) for path in self._shared.glob("*.stats")], axis=0)


def _split(array: Array) -> list[Array]:
    ends = np.cumsum([h.size for h in _HISTOGRAMS]).tolist()
    return np.split(array[: ends[-1]], ends[:-1])


def _mapped(path: Path) -> Array:
    with open(path, "w+b") as file:
        file.truncate(_SIZE * 8)
        return np.frombuffer(mmap.mmap(file.fileno(), _SIZE * 8), np.float64)


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


def exposition(model: str, engine: EngineMetrics, requests: RequestStats) -> bytes:
    """Prometheus' text format."""

    class All:
        def collect(self) -> Iterator[Metric]:
            labels = {"model_name": model}
            for family, table in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
                for name, (text, value) in table.items():
                    metric = family(name, text, labels=list(labels))
                    metric.add_metric(list(labels.values()), value(engine))
                    yield metric
            yield from requests.collect(labels)

    registry = CollectorRegistry()
    registry.register(All())
    return generate_latest(registry)
