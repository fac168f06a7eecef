"""headway bench serve: a server under load, and the same requests through LLM.generate in turn."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import uvloop

from headway.bench.engine_process import EngineProcess
from headway.bench.executors import Job, OfflineEngine
from headway.bench.load import Load, drive
from headway.bench.options import ServingOptions
from headway.bench.report import check_file, percentiles, versions
from headway.bench.throughput import for_mode
from headway.bench.workload import Pass, random_prompts, sampling
from headway.config import EngineArgs
from headway.errors import EngineError
from headway.executor.child import end_with_parent

_READY = re.compile(rb"headway: (\S+) serves ")
_WARM_UP = 2


def run(options: ServingOptions, args: EngineArgs) -> int:
    check_file(options.json)
    report = measure(options, args)
    print(json.dumps(report), flush=True)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure(options: ServingOptions, args: EngineArgs) -> dict[str, Any]:
    """The report: rates are tokens a second, of each repeat; latencies milliseconds, of all repeats."""
    args = for_mode(replace(args, runner="generate"), "generate")
    with ExitStack() as stack:
        url, startup_s, first_token_s = options.url, None, None
        if url is None:
            server = stack.enter_context(_Server(args, options.server_args))
            url, startup_s = server.url, server.startup_s
            _load(url, options, 1, 1, 0)
            first_token_s = time.monotonic() - server.began
        engine = None
        if options.baseline:
            engine = EngineProcess(OfflineEngine, args)
            stack.callback(engine.close)
            engine.ready()
            _offline(engine, options, options.concurrency, 0)
        _load(url, options, _WARM_UP * options.concurrency, options.output_len, 0)
        loads: list[Load] = []
        passes: list[Pass] = []
        for repeat in range(1, options.repeats + 1):
            loads.append(_load(url, options, options.num_prompts, options.output_len, repeat))
            _say(f"{repeat}: server {loads[-1].tokens_per_s:.0f} tokens/s")
            if engine is not None:
                passes.append(_offline(engine, options, options.num_prompts, repeat))
                _say(f"{repeat}: LLM.generate {passes[-1].tokens / passes[-1].elapsed_s:.0f} tokens/s")
    return {
        **{f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("json", "baseline")},
        "model": args.model,
        "startup_s": startup_s and round(startup_s, 2),
        "first_token_s": first_token_s and round(first_token_s, 2),
        "server_tokens_per_s": [round(load.tokens_per_s, 1) for load in loads],
        "requests_per_s": round(median(load.requests / load.elapsed_s for load in loads), 2),
        "llm_tokens_per_s": [round(one.tokens / one.elapsed_s, 1) for one in passes],
        "ratio": _ratio(loads, passes),
        **{
            name: percentiles([1e3 * gap for load in loads for gap in getattr(load, f"{name[:-3]}_s")])
            for name in ("ttft_ms", "itl_ms", "e2e_ms")
            if any(getattr(load, f"{name[:-3]}_s") for load in loads)
        },
        "versions": versions(),
    }


def _ratio(loads: list[Load], passes: list[Pass]) -> float | None:
    """The server's rate to LLM.generate's, the median of the repeats'."""
    ratios = [load.tokens_per_s * one.elapsed_s / one.tokens for load, one in zip(loads, passes)]
    return round(median(ratios), 3) if ratios else None


def _load(url: str, options: ServingOptions, num_prompts: int, output_len: int, seed: int) -> Load:
    path, bodies = _bodies(options, num_prompts, output_len, seed)
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    return uvloop.run(drive(url, path, bodies, options.concurrency, headers))


def _bodies(options: ServingOptions, num_prompts: int, output_len: int, seed: int) -> tuple[str, list[bytes]]:
    common: dict[str, Any] = sampling(output_len)
    if options.served_model:
        common["model"] = options.served_model
    if options.stream:
        common |= {"stream": True, "stream_options": {"include_usage": True}}
    if options.endpoint == "completions":
        prompts = random_prompts(options.input_len, num_prompts, options.seed + seed)
        return "/v1/completions", [msgspec.json.encode({**common, "prompt": prompt}) for prompt in prompts]
    texts = [f"{seed} {i} " + "word " * options.input_len for i in range(num_prompts)]
    messages = [[{"role": "user", "content": text}] for text in texts]
    return "/v1/chat/completions", [msgspec.json.encode({**common, "messages": one}) for one in messages]


def _offline(
    engine: EngineProcess[EngineArgs, Job, Pass], options: ServingOptions, num_prompts: int, seed: int
) -> Pass:
    return engine.run(
        Job(
            mode="generate",
            input_len=options.input_len,
            output_len=options.output_len,
            num_prompts=num_prompts,
            seed=options.seed + seed,
        )
    )


class _Server:
    """``headway serve`` with these settings, on a free port."""

    def __init__(self, args: EngineArgs, more: str | None) -> None:
        defaults = EngineArgs(model=args.model)
        given = {k: v for k, v in asdict(args).items() if v != getattr(defaults, k)}
        command = [sys.executable, "-m", "headway", "serve", args.model, "--port=0", *(more or "").split()]
        for name, value in given.items():
            flag = name.replace("_", "-")
            command.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag}={value}")
        self.began = time.monotonic()
        ends = partial(end_with_parent, signal.SIGTERM)
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=ends)
        self.url, self.startup_s = self._ready(), time.monotonic() - self.began

    def __enter__(self) -> _Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()

    def _ready(self) -> str:
        assert self._process.stderr is not None
        said = b""
        for line in self._process.stderr:
            if found := _READY.match(line):
                return found[1].decode()
            said += line
        raise EngineError(f"the server ended with status {self._process.wait()}: {said.decode().strip()}")


def _say(text: str) -> None:
    print(f"headway: {text}", file=sys.stderr, flush=True)
