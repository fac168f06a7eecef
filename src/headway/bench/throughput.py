"""headway bench throughput: a fixed workload, all prompts at once."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

from headway.bench.options import ThroughputOptions
from headway.bench.report import check_file, median, peak_rss_mb, process_age_s, publish, versions
from headway.bench.workload import random_prompts, sampling
from headway.config import EngineArgs

WARM_UP_PROMPTS = 8


def run(options: ThroughputOptions, args: EngineArgs) -> int:
    check_file(options.json)
    publish(measure(options, args), options.json)
    return 0


def measure(options: ThroughputOptions, args: EngineArgs) -> dict[str, Any]:
    """The report. Prefix caching is off unless asked for: every repeat does the whole work."""
    began = time.perf_counter()
    from headway.llm import LLM
    from headway.messages import SamplingParams

    if args.enable_prefix_caching is None:
        args = replace(args, enable_prefix_caching=False)
    prompts = random_prompts(options.input_len, options.num_prompts, options.seed)
    params = SamplingParams(**sampling(options.output_len))
    with LLM(**asdict(args)) as llm:
        startup_s = time.perf_counter() - began
        llm.generate(prompts[:1], SamplingParams(**sampling(1)))
        first_token_s = process_age_s()
        llm.generate(prompts[:WARM_UP_PROMPTS], params)
        elapsed_s: list[float] = []
        tokens = 0
        for _ in range(options.repeats):
            start = time.perf_counter()
            tokens = sum(len(out.outputs[0].token_ids) for out in llm.generate(prompts, params))
            elapsed_s.append(time.perf_counter() - start)
        return {
            "engine": "headway",
            "model": args.model,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "num_prompts": options.num_prompts,
            "startup_s": round(startup_s, 2),
            "first_token_s": None if first_token_s is None else round(first_token_s, 2),
            "elapsed_s": [round(t, 3) for t in elapsed_s],
            "output_tokens_per_s": round(tokens / median(elapsed_s), 1),
            "rows_per_s": round(options.num_prompts / median(elapsed_s), 2),
            "peak_rss_mb": peak_rss_mb(),
            "executor": llm.executor_info.executor,
            "async_scheduling": llm.config.scheduler.depth == 1,
            "enable_prefix_caching": llm.config.cache.enable_prefix_caching,
            "threads": llm.executor_info.threads,
            "kernels": llm.executor_info.kernels,
            "dtype": llm.config.model.dtype,
            "quantization": llm.config.model.quantization,
            "versions": versions(),
        }
