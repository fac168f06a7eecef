"""headway bench latency: one streamed request at a time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

from headway.bench.options import LatencyOptions
from headway.bench.report import accounting, check_file, engine_facts, peak_rss_mb, percentiles, publish
from headway.bench.workload import random_prompts, sampling
from headway.config import EngineArgs
from headway.llm import AsyncLLM
from headway.messages import SamplingParams


def run(options: LatencyOptions, args: EngineArgs) -> int:
    check_file(options.json)
    publish(asyncio.run(measure(options, args)), options.json)
    return 0


async def measure(options: LatencyOptions, args: EngineArgs) -> dict[str, Any]:
    """The report; times are milliseconds. Prefix caching is off unless asked for."""
    if args.enable_prefix_caching is None:
        args = replace(args, enable_prefix_caching=False)
    params = SamplingParams(**sampling(options.output_len))
    first: list[float] = []
    each: list[float] = []
    gaps: list[float] = []
    async with AsyncLLM(**asdict(args)) as llm:
        count, vocab_size = options.num_prompts + 1, llm.facts.vocab_size
        warm_up, *prompts = random_prompts(options.input_len, count, options.seed, vocab_size)
        await _arrivals(llm, warm_up, params)
        before = llm.metrics().times
        for prompt in prompts:
            times = await _arrivals(llm, prompt, params)
            first.append(times[0])
            each.append((times[-1] - times[0]) / (options.output_len - 1))
            gaps += [after - before for before, after in pairwise(times)]
        return {
            "engine": "headway",
            "model": args.model,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "num_prompts": options.num_prompts,
            "ttft_ms": percentiles(first),
            "tpot_ms": percentiles(each),
            "itl_ms": percentiles(gaps),
            **accounting(llm.metrics().times.since(before)),
            "peak_rss_mb": peak_rss_mb(llm.executor_info),
            **engine_facts(llm),
        }


async def _arrivals(llm: AsyncLLM, prompt: list[int], params: SamplingParams) -> list[float]:
    """Milliseconds from the call to each token; those that nobody was there for come together."""
    start = time.perf_counter()
    times: list[float] = []
    async for delta in llm.generate(prompt, params):
        times += [(time.perf_counter() - start) * 1e3] * len(delta.outputs[0].token_ids)
    return times
