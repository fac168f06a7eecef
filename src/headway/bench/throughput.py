"""headway bench throughput: a fixed workload, all prompts at once."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from headway.bench.options import ThroughputOptions
from headway.bench.report import accounting, check_file, engine_facts, peak_rss_mb, process_age_s, publish
from headway.bench.workload import Mode, random_prompts, run_pass
from headway.config import EngineArgs

WARM_UP_PROMPTS = 8


def run(options: ThroughputOptions, args: EngineArgs) -> int:
    check_file(options.json)
    publish(measure(options, args), options.json)
    return 0


def for_mode(args: EngineArgs, mode: Mode) -> EngineArgs:
    """Prefix caching is off unless asked for: every repeat does the whole work."""
    if args.runner is None:
        args = replace(args, runner="generate" if mode == "generate" else "pooling")
    return args if args.enable_prefix_caching is not None else replace(args, enable_prefix_caching=False)


def measure(options: ThroughputOptions, args: EngineArgs) -> dict[str, Any]:
    """The report; output_tokens_per_s is null where nothing is generated."""
    began = time.perf_counter()
    from headway.llm import LLM

    with LLM(**asdict(for_mode(args, options.mode))) as llm:
        startup_s = time.perf_counter() - began
        prompts = random_prompts(options.input_len, options.num_prompts, options.seed, llm.facts.vocab_size)
        run_pass(llm, options.mode, prompts[:1], 1)
        first_token_s = process_age_s()
        run_pass(llm, options.mode, prompts[:WARM_UP_PROMPTS], options.output_len)
        before = llm.metrics().times
        passes = [run_pass(llm, options.mode, prompts, options.output_len) for _ in range(options.repeats)]
        typical_s = median(one.elapsed_s for one in passes)
        tokens = passes[-1].tokens
        return {
            "engine": "headway",
            "model": args.model,
            "mode": options.mode,
            "input_len": options.input_len,
            "output_len": options.output_len,
            "num_prompts": options.num_prompts,
            "startup_s": round(startup_s, 2),
            "first_token_s": None if first_token_s is None else round(first_token_s, 2),
            "elapsed_s": [round(one.elapsed_s, 3) for one in passes],
            "output_tokens_per_s": round(tokens / typical_s, 1) if tokens else None,
            "rows_per_s": round(options.num_prompts / typical_s, 2),
            **accounting(llm.metrics().times.since(before)),
            "peak_rss_mb": peak_rss_mb(llm.executor_info),
            **engine_facts(llm),
        }
