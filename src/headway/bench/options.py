"""What the benchmarks take besides the engine's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headway.config.args import check_fields, setting
from headway.config.parallel import ACCEPTED, EXECUTORS
from headway.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions:
    mode: Literal["generate", "classify", "embed"] = setting("generate", text="what is asked of the model")
    input_len: int = setting(64, text="tokens a prompt", low=1)
    output_len: int = setting(64, text="tokens an answer", low=1)
    num_prompts: int = setting(64, text="prompts, all given at once", low=1)
    repeats: int = setting(3, text="times the workload runs; medians are reported", low=1)
    seed: int = setting(0, text="of the random prompts", low=0)
    json: str | None = setting(text="write the report to this file too")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    input_len: int = setting(32, text="tokens a prompt", low=1)
    output_len: int = setting(128, text="tokens an answer", low=2)
    num_prompts: int = setting(8, text="requests, one after the other", low=1)
    seed: int = setting(0, text="of the random prompts", low=0)
    json: str | None = setting(text="write the report to this file too")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorsOptions:
    """Lists are words between commas."""

    executors: str = setting("uni,mp,ray", text="executors to compare; uni is what the others are held against")
    async_scheduling: str = setting("on,off", text="on, off or both")
    concurrency: str = setting("1,64", text="requests that run at a time (max_num_seqs)")
    output_lens: str = setting("1,50", text="tokens an answer")
    mode: Literal["generate", "classify", "embed"] = setting("generate", text="what is asked of the model")
    input_len: int = setting(64, text="tokens a prompt", low=1)
    num_prompts: int | None = setting(
        text="prompts a repeat (default: 4 for each that runs at a time, 8 or more)", low=1
    )
    repeats: int = setting(5, text="times each workload runs on each engine, in turn; medians are reported", low=1)
    seed: int = setting(0, text="of the random prompts", low=0)
    json: str | None = setting(text="write the results to this file")
    report: str | None = setting(text="write a page with tables and plots to this file")

    def __post_init__(self) -> None:
        check_fields(self)
        if not set(words(self.async_scheduling)) <= {"on", "off"}:
            raise ConfigError("async_scheduling", self.async_scheduling, "must be on, off or on,off")
        for name in ("executors", "async_scheduling"):
            if not words(getattr(self, name)):
                raise ConfigError(name, getattr(self, name), "must name at least one")
        if not all(word in ("auto", *EXECUTORS) or ":" in word for word in words(self.executors)):
            raise ConfigError("executors", self.executors, f"each must be {ACCEPTED}")
        for name in ("concurrency", "output_lens"):
            given = words(getattr(self, name))
            if not given or not all(word.isdigit() and int(word) > 0 for word in given):
                raise ConfigError(name, getattr(self, name), "must be numbers from 1, with commas between them")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorOptions:
    """mode is words between commas: see MODES of processor_modes."""

    mode: str = setting(
        "engine",
        text="how the job is done; several, with commas between them, take turns: generate (LLM.generate, what the "
        "others are held against), local, local_two_engines, local_shared_engine; on Ray: engine, two_engines, "
        "shared_engine, serve_deployment, shared_serve_deployment; classify",
    )
    num_prompts: int = setting(1000, text="rows a repeat", low=1)
    input_len: int = setting(64, text="tokens a prompt", low=1)
    max_tokens: int = setting(64, text="tokens an answer, exactly", low=1)
    batch_size: int = setting(32, text="rows that a worker on Ray is given at a time", low=1)
    concurrency: int = setting(1, text="workers on Ray, each with an engine of its own where none is shared", low=1)
    num_blocks: int | None = setting(text="blocks of the dataset on Ray (default: as Ray chooses)", low=1)
    repeats: int = setting(3, text="times the job is done in each mode, in turn; medians are reported", low=1)
    seed: int = setting(0, text="of the random prompts, which are others in each repeat", low=0)
    json: str | None = setting(text="write the results to this file")
    report: str | None = setting(text="write a page with tables and plots to this file")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingOptions:
    url: str | None = setting(text="a server that runs already, of any make (default: start one with these settings)")
    server_args: str | None = setting(text="further options of the server that is started, in one word")
    served_model: str | None = setting(text="the model's name in requests, where the server wants one")
    api_key: str | None = setting(text="the bearer token of requests")
    endpoint: Literal["completions", "chat"] = setting("completions", text="random token ids, or conversations")
    stream: bool = setting(True, text="answers come as server-sent events")
    baseline: bool = setting(True, text="run the same requests through LLM.generate in turn; not for chat")
    concurrency: int = setting(64, text="requests at a time", low=1)
    input_len: int = setting(64, text="tokens a prompt (of chat: words)", low=1)
    output_len: int = setting(64, text="tokens an answer", low=1)
    num_prompts: int = setting(256, text="requests a repeat", low=1)
    repeats: int = setting(5, text="times the load runs; medians are reported", low=1)
    seed: int = setting(0, text="of the random prompts, which are others in each repeat", low=0)
    json: str | None = setting(text="write the report to this file too")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.baseline and self.endpoint == "chat":
            raise ConfigError("baseline", True, "is of prompts of token ids; with endpoint=chat say no-baseline")


def words(text: str) -> list[str]:
    """Between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
