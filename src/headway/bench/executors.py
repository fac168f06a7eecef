"""headway bench executors: the same workloads on one engine for each executor and depth, in turn."""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from headway.bench.comparison import Comparison, Row
from headway.bench.engine_process import EngineProcess, Ready, Subject
from headway.bench.options import ExecutorsOptions, words
from headway.bench.report import check_file, engine_facts, versions
from headway.bench.throughput import WARM_UP_PROMPTS, for_mode
from headway.bench.workload import Mode, Pass, random_prompts, run_pass
from headway.config import EngineArgs, machine_facts, resolve
from headway.errors import ConfigError, EngineError
from headway.models.describe import describe
from headway.models.source import resolve_source


def run(options: ExecutorsOptions, args: EngineArgs) -> int:
    """Exit status 1 if no combination could run."""
    check_file(options.json)
    check_file(options.report, "report")
    _check(options, args)
    comparison = measure(options, args)
    print(comparison.as_text(), flush=True)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(msgspec.to_builtins(comparison), indent=2) + "\n")
    if options.report is not None:
        from headway.bench.comparison_page import page

        Path(options.report).write_text(page(comparison), encoding="utf-8")
    return 0 if any(row.error is None for row in comparison.rows) else 1


def _check(options: ExecutorsOptions, args: EngineArgs) -> None:
    """Raises before anything starts where nothing could run: the model, the settings of every executor, the lengths."""
    path = resolve_source(args.model, args.revision, load_format=args.load_format)
    facts, machine = describe(path), machine_facts()
    refused: list[ConfigError] = []
    longest = 0
    for executor in words(options.executors):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = resolve(_for(executor, for_mode(args, options.mode)), facts, machine, str(path))
            longest = max(longest, config.model.max_model_len)
        except ConfigError as error:
            refused.append(error)
    if len(refused) == len(words(options.executors)):
        raise refused[0]
    answer = max(map(int, words(options.output_lens))) if options.mode == "generate" else 0
    if options.input_len + answer > longest:
        accepted = f"with an answer of {answer}, must fit max_model_len={longest}"
        raise ConfigError("input_len", options.input_len, accepted)


def _for(executor: str, args: EngineArgs) -> EngineArgs:
    args = replace(args, distributed_executor_backend=executor)
    if executor == "ray" and args.placement_group_config is None:
        args = replace(args, placement_group_config=_SIDE_BY_SIDE)
    return args


def measure(options: ExecutorsOptions, args: EngineArgs) -> Comparison:
    """Engines of one concurrency live side by side; a repeat goes once through them all."""
    args = for_mode(args, options.mode)
    output_lens = [int(word) for word in words(options.output_lens)] if options.mode == "generate" else [1]
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for concurrency in (int(word) for word in words(options.concurrency)):
        jobs = [_job(options, concurrency, output_len) for output_len in output_lens]
        with ExitStack() as stack:
            engines = [
                _start(stack, executor, depth == "on", concurrency, args)
                for executor, depth in product(words(options.executors), words(options.async_scheduling))
            ]
            for job in jobs:
                rows += _alternate(engines, job, options.repeats, concurrency)
        facts = next((e.ready.facts for e in engines if e.ready is not None), facts)
    kept = ("threads", "kernels", "dtype", "quantization")
    return Comparison(
        model=args.model,
        mode=options.mode,
        input_len=options.input_len,
        repeats=options.repeats,
        engine={name: facts.get(name) for name in kept},
        versions=versions(),
        rows=rows,
    )


# Engines take turns, and a machine's cores must do for all that wait.
_SIDE_BY_SIDE = {"bundle_per_worker": {"CPU": 0.1}}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    mode: Mode
    input_len: int
    output_len: int
    num_prompts: int
    seed: int


class OfflineEngine(Subject[EngineArgs, Job, Pass]):
    types = (EngineArgs, Job, Pass)

    def __init__(self, setup: EngineArgs) -> None:
        from headway.llm import LLM

        self._llm = LLM(**asdict(setup))

    def facts(self) -> dict[str, Any]:
        return engine_facts(self._llm)

    def run(self, job: Job) -> Pass:
        prompts = random_prompts(job.input_len, job.num_prompts, job.seed, self._llm.facts.vocab_size)
        return run_pass(self._llm, job.mode, prompts, job.output_len)

    def close(self) -> None:
        self._llm.close()


@dataclass(slots=True)
class _Engine:
    """error: why it does not run, or no longer."""

    executor: str
    async_scheduling: bool
    process: EngineProcess[EngineArgs, Job, Pass]
    ready: Ready | None = None
    error: str | None = None
    passes: list[Pass] = field(default_factory=list[Pass])

    @property
    def name(self) -> str:
        return f"{self.executor}, async scheduling {'on' if self.async_scheduling else 'off'}"

    def run(self, job: Job) -> Pass | None:
        if self.error is None:
            try:
                return self.process.run(job)
            except EngineError as error:
                self.error = str(error)
        return None


def _start(stack: ExitStack, executor: str, overlap: bool, concurrency: int, args: EngineArgs) -> _Engine:
    args = replace(_for(executor, args), async_scheduling=overlap, max_num_seqs=concurrency)
    engine = _Engine(executor, overlap, EngineProcess(OfflineEngine, args))
    stack.callback(engine.process.close)
    _say(f"starting {engine.name}, concurrency {concurrency}")
    try:
        engine.ready = engine.process.ready()
    except EngineError as error:
        engine.error = str(error)
        _say(f"{executor} does not run: {error}")
    return engine


def _alternate(engines: list[_Engine], job: Job, repeats: int, concurrency: int) -> list[Row]:
    for engine in engines:
        engine.passes = []
        engine.run(msgspec.structs.replace(job, num_prompts=min(job.num_prompts, WARM_UP_PROMPTS)))
    for repeat in range(repeats):
        for engine in engines:
            if (one := engine.run(job)) is not None:
                engine.passes.append(one)
                rate = f"{job.num_prompts / one.elapsed_s:.2f} rows/s"
                _say(f"{engine.name}, concurrency {concurrency}, output {job.output_len}, {repeat + 1}: {rate}")
    return [
        Row.of(
            engine.executor,
            engine.async_scheduling,
            concurrency,
            job.output_len,
            job.num_prompts,
            engine.passes,
            startup_s=None if engine.ready is None else engine.ready.startup_s,
            error=engine.error,
        )
        for engine in engines
    ]


def _job(options: ExecutorsOptions, concurrency: int, output_len: int) -> Job:
    return Job(
        mode=options.mode,
        input_len=options.input_len,
        output_len=output_len,
        num_prompts=options.num_prompts or max(8, 4 * concurrency),
        seed=options.seed,
    )


def _say(text: str) -> None:
    print(f"headway: {text}", file=sys.stderr, flush=True)
