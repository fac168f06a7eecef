"""The ways to do a batch job that headway bench processor compares, each in a process of its own.

Rows carry their own times: when a step took them in and when it let them go, whatever machinery was in between.
"""

from __future__ import annotations

import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import msgspec

from headway.batch import (
    EngineProcessorConfig,
    Processor,
    ProcessorConfig,
    ServeDeploymentProcessorConfig,
    build_processor,
)
from headway.bench.engine_process import Subject
from headway.bench.report import tree_peak_rss_mb, versions
from headway.bench.workload import random_prompts, sampling
from headway.config import EngineArgs
from headway.messages import PoolingParams, SamplingParams

QUESTION_LEN = 16
"""Tokens that the second turn of a conversation adds."""

Records = list[dict[str, Any]]
RowFunction = Callable[[dict[str, Any]], dict[str, Any]]
Runs = Literal["offline", "local", "ray", "serve"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """text: for people. steps: turns of the conversation, each a processor. shared: they have one engine."""

    text: str
    runs: Runs
    steps: int = 1
    shared: bool = False

    def engines(self, concurrency: int) -> int:
        """concurrency: of workers on Ray, which replicas of a deployment are too; one engine that is shared is one."""
        each = 1 if self.shared else self.steps
        return each * concurrency if self.runs == "serve" or (self.runs == "ray" and not self.shared) else each

    @property
    def on_ray(self) -> bool:
        return self.runs in ("ray", "serve")

    @property
    def stays(self) -> bool:
        """Its engines outlive a job. On Ray they start with the first row."""
        return self.runs != "ray" or self.shared


MODES = {
    "generate": Mode(text="LLM.generate (or classify) on the same rows", runs="offline"),
    "local": Mode(text="the local runner, from file to file", runs="local"),
    "local_two_engines": Mode(text="the local runner, two turns, an engine for each", runs="local", steps=2),
    "local_shared_engine": Mode(text="the local runner, two turns on one engine", runs="local", steps=2, shared=True),
    "engine": Mode(text="Ray Data", runs="ray"),
    "classify": Mode(text="Ray Data, classification", runs="ray"),
    "two_engines": Mode(text="Ray Data, two turns, an engine for each", runs="ray", steps=2),
    "shared_engine": Mode(text="Ray Data, two turns on one engine", runs="ray", steps=2, shared=True),
    "serve_deployment": Mode(text="Ray Data, the engine behind Ray Serve", runs="serve", shared=True),
    "shared_serve_deployment": Mode(
        text="Ray Data, two turns on one engine behind Ray Serve", runs="serve", steps=2, shared=True
    ),
}


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """slots: max_num_seqs of all engines together. address: of the Ray cluster."""

    mode: str
    task: Literal["generate", "classify"]
    args: EngineArgs
    batch_size: int
    concurrency: int
    num_blocks: int | None
    max_tokens: int
    slots: int
    address: str | None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    num_prompts: int
    input_len: int
    seed: int
    vocab_size: int


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a job. elapsed_s: from the first row that went in to the last that came out; startup_s: before that.

    peak_in_flight: rows in all steps at a time. filled: see in_flight. Both null where only the whole can be
    seen. wall_s: of everything. peak_rss_mb: so far.
    """

    wall_s: float
    startup_s: float
    elapsed_s: float
    rows: int
    failed: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    peak_in_flight: int | None
    filled: float | None
    peak_rss_mb: float | None


def rows_of(job: Job, steps: int) -> Records:
    prompts = random_prompts(job.input_len, job.num_prompts, job.seed, job.vocab_size)
    rows: Records = [{"id": i, "tokenized_prompt": prompt} for i, prompt in enumerate(prompts)]
    if steps > 1:
        questions = random_prompts(QUESTION_LEN, job.num_prompts, job.seed + 1, job.vocab_size)
        for row, question in zip(rows, questions):
            row["question"] = question
    return rows


def take_in(row: dict[str, Any]) -> dict[str, Any]:
    return {"began": [*row.get("began", ()), time.time()]}


def let_go(row: dict[str, Any], last: bool) -> dict[str, Any]:
    """Before the last step, the next one's row: the conversation so far and a further question."""
    out: dict[str, Any] = {
        "id": row["id"],
        "began": row["began"],
        "ended": [*row.get("ended", ()), time.time()],
        "input_tokens": row.get("input_tokens", 0) + row["num_input_tokens"],
        "output_tokens": row.get("output_tokens", 0) + row.get("num_generated_tokens", 0),
        "cached_tokens": row.get("cached_tokens", 0) + row["num_cached_tokens"],
    }
    if not last:
        out["tokenized_prompt"] = [*row["prompt_token_ids"], *row["generated_tokens"], *row["question"]]
    return out


def request(row: dict[str, Any], sampling_params: dict[str, Any]) -> dict[str, Any]:
    """For a deployment."""
    asked = {"tokenized_prompt": row["tokenized_prompt"], "sampling_params": sampling_params}
    return {**take_in(row), "method": "generate", "request_kwargs": asked}


def processors(config: ProcessorConfig, steps: int, enter: RowFunction = take_in) -> list[Processor]:
    """One for each turn."""
    return [build_processor(config, enter, partial(let_go, last=step == steps - 1)) for step in range(steps)]


def engine_config(setup: Setup) -> EngineProcessorConfig:
    settings = {f.name: (getattr(setup.args, f.name), f.default) for f in fields(EngineArgs) if f.name != "model"}
    return EngineProcessorConfig(
        model_source=setup.args.model,
        engine_kwargs={name: value for name, (value, default) in settings.items() if value != default},
        task_type=setup.task,
        sampling_params=sampling(setup.max_tokens) if setup.task == "generate" else {},
        shared="bench" if MODES[setup.mode].shared else None,
        batch_size=setup.batch_size,
        concurrency=setup.concurrency,
        should_continue_on_error=True,
    )


class Way(ABC):
    """Does jobs in one way; a job's rows come back with their times and tokens, or with an error."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.stack = ExitStack()

    @abstractmethod
    def run(self, rows: Records) -> tuple[Records, float | None]:
        """The rows, and how long they took where they do not say so."""


class Offline(Way):
    """The baseline."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        from headway.llm import LLM

        self._llm = self.stack.enter_context(LLM(**asdict(setup.args)))

    def run(self, rows: Records) -> tuple[Records, float | None]:
        prompts = [row["tokenized_prompt"] for row in rows]
        began = time.perf_counter()
        records: Records = []
        if self.setup.task == "generate":
            for out in self._llm.generate(prompts, SamplingParams(**sampling(self.setup.max_tokens))):
                names = ("prompt_tokens", "completion_tokens", "cached_tokens")
                given, generated, cached = (out.usage[name] for name in names)
                records.append({"input_tokens": given, "output_tokens": generated, "cached_tokens": cached})
        else:
            for pooled in self._llm.classify(prompts, PoolingParams(task="classify")):
                counts = {"input_tokens": len(pooled.prompt_token_ids), "cached_tokens": pooled.num_cached_tokens}
                records.append({**counts, "output_tokens": 0})
        return records, time.perf_counter() - began


class Local(Way):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        first, *others = processors(engine_config(setup), MODES[setup.mode].steps)
        for other in others:
            first = first.then(other)
        self._processor = self.stack.enter_context(first)
        self._folder = Path(self.stack.enter_context(TemporaryDirectory()))

    def run(self, rows: Records) -> tuple[Records, float | None]:
        from headway.batch.job import JobOptions

        source, target = self._folder / "in.jsonl", self._folder / "out.jsonl"
        source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        summary = self._processor.run(source, target, JobOptions(progress=False))
        return [json.loads(line) for line in target.read_text().splitlines()], summary.elapsed_s


class OnRay(Way):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        import ray
        from ray.data import DataContext

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.init(setup.address, logging_level=logging.WARNING, log_to_driver=False)
        self.stack.callback(ray.shutdown)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.wait_for_min_actors_s = 600  # a second engine does not load while the first one is measured
        self._processors = [self.stack.enter_context(processor) for processor in self.processors()]

    def processors(self) -> list[Processor]:
        return processors(engine_config(self.setup), MODES[self.setup.mode].steps)

    def run(self, rows: Records) -> tuple[Records, float | None]:
        import ray

        dataset = ray.data.from_items(rows, override_num_blocks=self.setup.num_blocks)
        for processor in self._processors:
            dataset = processor(dataset)
        return dataset.materialize().take_all(), None


class OnServe(OnRay):
    def processors(self) -> list[Processor]:
        from ray import serve

        from headway.batch.serve import build_llm_deployment

        setup, engine, name = self.setup, engine_config(self.setup), f"bench-{os.getpid()}"
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        deployment = build_llm_deployment(
            engine.model_source, engine_kwargs=engine.engine_kwargs, name="LLM", num_replicas=setup.concurrency
        )
        serve.run(deployment, name=name, route_prefix=None)
        self.stack.callback(serve.delete, name)
        config = ServeDeploymentProcessorConfig(
            app_name=name,
            deployment_name="LLM",
            batch_size=setup.batch_size,
            concurrency=setup.concurrency,
            should_continue_on_error=True,
        )
        enter = partial(request, sampling_params=engine.sampling_params)
        return processors(config, MODES[setup.mode].steps, enter)


_WAYS: dict[Runs, Callable[[Setup], Way]] = {"offline": Offline, "local": Local, "ray": OnRay, "serve": OnServe}


class Contender(Subject[Setup, Job, Turn]):
    types = (Setup, Job, Turn)

    def __init__(self, setup: Setup) -> None:
        self._setup, self._mode = setup, MODES[setup.mode]
        self._way = _WAYS[self._mode.runs](setup)

    def facts(self) -> dict[str, Any]:
        return {"versions": versions()}

    def run(self, job: Job) -> Turn:
        rows = rows_of(job, self._mode.steps)
        began = time.time()
        records, took = self._way.run(rows)
        return turn_of(records, began, time.time(), took, self._setup.slots, self._mode.on_ray)

    def close(self) -> None:
        self._way.stack.close()


def turn_of(records: Records, began: float, ended: float, took: float | None, slots: int, elsewhere: bool) -> Turn:
    """took: for rows that do not say; else their times count. elsewhere: the memory is other processes'."""
    well = [row for row in records if row.get("error") is None]
    spans = [span for row in well for span in zip(row.get("began", ()), row.get("ended", ()))]
    peak, filled = in_flight(spans, slots) if spans else (None, None)
    last = max((e for _, e in spans), default=ended)
    first = min((b for b, _ in spans), default=began if took is None else ended - took)
    sums = {name: sum(row[name] for row in well) for name in ("input_tokens", "output_tokens", "cached_tokens")}
    return Turn(
        wall_s=ended - began,
        startup_s=max(0.0, first - began),
        elapsed_s=last - first if took is None else took,
        rows=len(records),
        failed=len(records) - len(well),
        peak_in_flight=peak,
        filled=filled,
        peak_rss_mb=None if elsewhere else tree_peak_rss_mb(),
        **sums,
    )


def in_flight(spans: Sequence[tuple[float, float]], slots: int) -> tuple[int, float]:
    """The most at a time, and the share of ``slots`` that was taken, on average from the first out to the last in."""
    first, last = min(ended for _, ended in spans), max(began for began, _ in spans)
    inside, peak, before, area = 0, 0, first, 0.0
    for when, change in sorted(chain(((began, 1) for began, _ in spans), ((ended, -1) for _, ended in spans))):
        if first < when <= last:
            area += min(inside, slots) * (when - before)
            before = when
        inside += change
        peak = max(peak, inside)
    return peak, area / (last - first) / slots if last > first else min(peak, slots) / slots
