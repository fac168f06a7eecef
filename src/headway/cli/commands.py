"""The commands: what each takes, and the function that runs it, imported when it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from headway.batch.options import BatchOptions
from headway.bench.options import ExecutorsOptions, LatencyOptions, ProcessorOptions, ServingOptions, ThroughputOptions
from headway.cli.options import Parser, add_options, build, read_config
from headway.config.args import EngineArgs, check_fields, setting
from headway.server.options import ServeOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    system: str | None = setting(text="a system message that opens the conversation")
    max_tokens: int = setting(512, text="tokens an answer, at most", low=1)
    temperature: float = setting(0.6, text="0 always takes the most likely token", low=0.0)
    top_p: float = setting(0.9, text="sample from the most likely tokens that make up this probability", low=0.0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainOptions:
    json: bool = setting(False, text="print JSON instead of a table")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """words: how it is called. run: "module:function", called as function(own options, engine args) -> exit status.

    skip: engine settings whose names the command's own options take. runner: what it needs of the model. model_first:
    the model may be the first word, without --model.
    """

    words: str
    text: str
    run: str
    options: type | None = None
    engine: bool = True
    skip: tuple[str, ...] = ()
    runner: str | None = None
    model_first: bool = False

    def parser(self) -> Parser:
        needs = "" if not self.engine else " MODEL" if self.model_first else " --model MODEL"
        own = " INPUT -o OUTPUT" if self.options is BatchOptions else ""
        usage = f"headway {self.words}{own}{needs} [options]"
        parser = Parser(prog=f"headway {self.words}", usage=usage, description=self.text, allow_abbrev=False)
        if self.options:
            add_options(parser, self.options, "options")
        if self.engine:
            add_options(parser, EngineArgs, "engine (every one but the model is automatic)", self.skip)
        return parser

    def call(self, words: list[str]) -> int:
        if self.model_first and words and not words[0].startswith("-"):
            words = ["--model", *words]
        if self.options is ServeOptions:
            words = read_config(words)
        values = self.parser().parse_exactly(words)
        arguments: list[Any] = []
        if self.options:
            arguments.append(build(self.options, values))
        if self.engine:
            given = {k: v for k, v in values.items() if k not in self.skip}
            arguments.append(build(EngineArgs, {"runner": self.runner, **given}))
        return self._function()(*arguments)

    def _function(self) -> Callable[..., int]:
        module, _, name = self.run.partition(":")
        return getattr(import_module(module), name)


COMMANDS = (
    Command(
        words="batch",
        text="Answer, embed or classify every row of a file.",
        run="headway.batch.command:run",
        options=BatchOptions,
        skip=("runner",),
    ),
    Command(
        words="serve",
        text="Answer OpenAI's API over HTTP.",
        run="headway.server.run:run",
        options=ServeOptions,
        model_first=True,
    ),
    Command(
        words="chat",
        text="Talk to a model.",
        run="headway.cli.chat:run",
        options=ChatOptions,
        runner="generate",
        model_first=True,
    ),
    Command(
        words="config explain",
        text="Show every resolved setting, its value and its reason.",
        run="headway.cli.explain:run",
        options=ExplainOptions,
        model_first=True,
    ),
    Command(
        words="bench throughput",
        text="Measure offline throughput on a fixed workload.",
        run="headway.bench.throughput:run",
        options=ThroughputOptions,
        skip=("seed",),
    ),
    Command(
        words="bench latency",
        text="Measure time to first token and time per token, one request at a time.",
        run="headway.bench.latency:run",
        options=LatencyOptions,
        skip=("seed",),
        runner="generate",
    ),
    Command(
        words="bench executors",
        text="Compare executors, with and without async scheduling, in alternating repeats.",
        run="headway.bench.executors:run",
        options=ExecutorsOptions,
        skip=("seed", "async_scheduling", "distributed_executor_backend", "max_num_seqs", "trace"),
    ),
    Command(
        words="bench processor",
        text="Compare ways to do a batch job, in alternating repeats.",
        run="headway.bench.processor:run",
        options=ProcessorOptions,
        skip=("seed", "trace"),
    ),
    Command(
        words="bench serve",
        text="Measure a server under load, against LLM.generate on the same requests.",
        run="headway.bench.serving:run",
        options=ServingOptions,
        skip=("seed", "runner"),
    ),
    Command(words="version", text="Print the version.", run="headway.cli.version:run", engine=False),
)
