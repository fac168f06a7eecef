"""headway bench processor: the same rows through batch processors of several kinds, in turn."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import msgspec

from headway.bench.engine_process import EngineProcess
from headway.bench.options import ProcessorOptions, words
from headway.bench.processor_modes import MODES, QUESTION_LEN, Contender, Job, Mode, Setup, Turn
from headway.bench.processor_report import Report, Row
from headway.bench.report import check_file, versions
from headway.bench.throughput import WARM_UP_PROMPTS, for_mode
from headway.config import EngineArgs, EngineConfig, machine_facts, resolve
from headway.errors import ConfigError, EngineError, MissingDependencyError
from headway.models.describe import describe
from headway.models.source import resolve_source

Task = Literal["generate", "classify"]
CLASSIFY = {"generate", "local", "engine", "classify"}
"""Modes that classify where one of them is so called."""


def run(options: ProcessorOptions, args: EngineArgs) -> int:
    """Exit status 1 if a mode could not run, or rows failed."""
    check_file(options.json)
    check_file(options.report, "report")
    report = measure(options, args)
    print(report.as_text(), flush=True)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(msgspec.to_builtins(report), indent=2) + "\n")
    if options.report is not None:
        Path(options.report).write_text(report.page(), encoding="utf-8")
    return 1 if any(row.error is not None or row.most("failed") for row in report.rows) else 0


def measure(options: ProcessorOptions, args: EngineArgs) -> Report:
    """Each mode in a process of its own; a repeat goes once through them all, with rows of its own."""
    task, names = task_of(options), words(options.mode)
    config, vocab_size = _resolved(options, args, task)
    job = Job(num_prompts=options.num_prompts, input_len=options.input_len, seed=options.seed, vocab_size=vocab_size)
    with ExitStack() as stack:
        address = args.ray_address
        if address is None and any(MODES[name].on_ray for name in names):
            ranks = args.tensor_parallel_size * args.pipeline_parallel_size
            address = stack.enter_context(_cluster(len(names) * 2 * options.concurrency * ranks))
        setup = Setup(
            mode=names[0],
            task=task,
            args=args,
            batch_size=options.batch_size,
            concurrency=options.concurrency,
            num_blocks=options.num_blocks,
            max_tokens=options.max_tokens,
            slots=config.scheduler.max_num_seqs,
            address=address,
        )
        contenders = [_start(stack, name, setup) for name in names]
        for contender in contenders:
            contender.warm_up(msgspec.structs.replace(job, seed=options.seed + 2 * options.repeats))
        for repeat in range(options.repeats):
            for contender in contenders:
                contender.run(msgspec.structs.replace(job, seed=options.seed + 2 * repeat), repeat)
    given = {f.name: getattr(args, f.name) for f in fields(EngineArgs) if f.name != "model"}
    resolved = {"threads": config.device.threads, "isa": config.device.isa, "dtype": config.model.dtype}
    return Report(
        model=args.model,
        settings={name: value for name, value in asdict(options).items() if name not in ("json", "report")},
        engine={**{n: value for n, value in given.items() if value != getattr(_DEFAULTS, n)}, **resolved},
        versions=versions(),
        rows=[contender.row for contender in contenders],
    )


_DEFAULTS = EngineArgs(model="")


def task_of(options: ProcessorOptions) -> Task:
    names = words(options.mode)
    for name in names:
        if name not in MODES:
            raise ConfigError("mode", name, f"must be of {', '.join(MODES)}")
    if not names:
        raise ConfigError("mode", options.mode, "must name at least one")
    if "classify" not in names:
        return "generate"
    if not {*names} <= CLASSIFY:
        raise ConfigError("mode", options.mode, f"beside classify must be of {', '.join(sorted(CLASSIFY))}")
    return "classify"


def _resolved(options: ProcessorOptions, args: EngineArgs, task: Task) -> tuple[EngineConfig, int]:
    """Raises before anything starts: the model, the engine's settings, the lengths. And the vocabulary's size."""
    path = resolve_source(args.model, args.revision, load_format=args.load_format)
    facts = describe(path)
    config = resolve(for_mode(args, task), facts, machine_facts(), str(path))
    if task == "classify" and not facts.num_labels:
        raise ConfigError("mode", "classify", f"{args.model} has no classification head")
    answer = options.max_tokens if task == "generate" else 0
    turns = max(MODES[name].steps for name in words(options.mode))
    length = options.input_len + answer + (turns - 1) * (QUESTION_LEN + answer)
    if length > config.model.max_model_len:
        accepted = f"makes {length} tokens with the answers, must fit max_model_len={config.model.max_model_len}"
        raise ConfigError("input_len", options.input_len, accepted)
    return config, facts.vocab_size


@contextmanager
def _cluster(cpus: int) -> Generator[str]:
    """A Ray cluster of this machine, in which all modes have room at the same time."""
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("modes on Ray need Ray: pip install 'headway[ray]'") from error
    ray.init(num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


@dataclass(slots=True)
class _Contender:
    process: EngineProcess[Setup, Job, Turn]
    row: Row
    mode: Mode

    def warm_up(self, job: Job) -> None:
        """Engines that do not stay start in every repeat."""
        if not self.mode.stays:
            return
        first = self._run(msgspec.structs.replace(job, num_prompts=1))
        if first is not None:
            self._add_start(first.wall_s if self.mode.on_ray else first.startup_s)
        self._run(msgspec.structs.replace(job, num_prompts=min(job.num_prompts, WARM_UP_PROMPTS)))

    def run(self, job: Job, repeat: int) -> None:
        turn = self._run(job)
        if turn is None:
            return
        if not self.mode.stays and not self.row.turns:
            self._add_start(turn.startup_s)
        self.row.turns.append(turn)
        _say(f"{self.row.mode}, {repeat + 1}: {turn.rows / turn.elapsed_s:.2f} rows/s")

    def _add_start(self, seconds: float) -> None:
        assert self.row.startup_s is not None
        self.row.startup_s += seconds

    def _run(self, job: Job) -> Turn | None:
        if self.row.error is not None:
            return None
        try:
            return self.process.run(job)
        except EngineError as error:
            self.row.error = str(error)
            _say(f"{self.row.mode} does not run: {error}")
            return None


def _start(stack: ExitStack, name: str, setup: Setup) -> _Contender:
    """setup: of any mode, but for slots, which are one engine's."""
    mode = MODES[name]
    engines = mode.engines(setup.concurrency)
    args = for_mode(setup.args, setup.task)
    if mode.steps > 1:  # what a second turn is there for
        args = replace(args, enable_prefix_caching=setup.args.enable_prefix_caching)
    setup = msgspec.structs.replace(setup, mode=name, args=args, slots=setup.slots * engines)
    _say(f"starting {name}")
    contender = _Contender(EngineProcess(Contender, setup), Row(mode=name, engines=engines, slots=setup.slots), mode)
    stack.callback(contender.process.close)
    try:
        contender.row.startup_s = contender.process.ready().startup_s
    except EngineError as error:
        contender.row.error = str(error)
        _say(f"{name} does not run: {error}")
    return contender


def _say(text: str) -> None:
    print(f"headway: {text}", file=sys.stderr, flush=True)
