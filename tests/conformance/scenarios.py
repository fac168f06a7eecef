"""What every executor must do alike: each scenario drives one engine and returns what came of it, as JSON has it."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headway import LLM, PoolingParams, RequestOutput, SamplingParams, StructuredOutput
from headway.errors import EngineDead, HeadwayError, WorkerError
from headway.messages import StepPlan

Scenario = Callable[[LLM], Any]

SHARED = "A list of European countries and their capital cities, each followed by a short remark on the food there. "
PROMPTS = [
    "The capital of France is",
    SHARED + "France:",
    "def fibonacci(n):",
    SHARED * 3 + "Spain:",
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ada", "Grace", "Barbara"]}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
NAME = "[A-Z][a-z]{2,8}( [A-Z][a-z]{2,8})?"


def perform(scenarios: Sequence[str], model: str, other: str = "", **settings: Any) -> dict[str, Any]:
    """What each of the scenarios says, of one engine that runs them all. other: weights of the same shapes.

    A scenario that fails says its traceback. "info" is the engine's, "left" what is left of it once it is closed.
    """
    before, said = what_there_is(), dict[str, Any]()
    pids = _drive(scenarios, said, other, {"model": model, **settings})
    gc.collect()  # a channel's memory is mapped as long as its engine is referred to
    said["left"] = left(before, [pid for pid in pids if pid != os.getpid()])
    return said


def _drive(scenarios: Sequence[str], said: dict[str, Any], other: str, settings: dict[str, Any]) -> list[int]:
    """Fills ``said``; the processes of the engine's ranks."""
    with LLM(**settings) as llm:
        info = llm.executor_info
        for name in scenarios:
            try:
                result = new_weights(llm, other) if name == "new weights" else SCENARIOS[name](llm)
            except Exception:
                result = traceback.format_exc()
            said[name] = json.loads(msgspec.json.encode(result))
        said["info"] = [info.executor, info.ranks, info.depth]
    return info.pids


# Tokens and text ------------------------------------------------------------------------------------------------------


def greedy(llm: LLM) -> Any:
    return generate(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))


def seeded_samples(llm: LLM) -> Any:
    shapes: list[dict[str, Any]] = [{"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}]
    params = [SamplingParams(seed=i, max_tokens=24, ignore_eos=True, **shape) for i, shape in enumerate(shapes)]
    return generate(llm, PROMPTS, params)


def penalties(llm: LLM) -> Any:
    """Few tokens are likely, so that most of them come again."""
    likely = dict.fromkeys(range(1000, 1020), 30.0)
    shapes = [{"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
    base: dict[str, Any] = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "logit_bias": likely}
    params = [SamplingParams(**base, **shape) for shape in shapes]
    return generate(llm, PROMPTS[:3], params)


def banned_and_favoured_tokens(llm: LLM) -> Any:
    """The greedy tokens are banned as words, then by a bias; another one is favoured; an end is put off."""
    base: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    (first,) = llm.generate(PROMPTS[0], SamplingParams(**base))
    words = [llm.tokenizer.decode([token]) for token in first.outputs[0].token_ids]
    biases = dict.fromkeys(first.outputs[0].token_ids, -100.0)
    params = [
        SamplingParams(bad_words=[word for word in words if word.strip()], **base),
        SamplingParams(logit_bias=biases, **base),
        SamplingParams(logit_bias={1234: 100.0}, **base),
        SamplingParams(stop_token_ids=first.outputs[0].token_ids, **base),
        SamplingParams(stop_token_ids=first.outputs[0].token_ids, min_tokens=4, **base),
    ]
    return generate(llm, [PROMPTS[0]] * len(params), params)


def logprobs(llm: LLM) -> Any:
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    sampled = SamplingParams(top_k=20, seed=7, max_tokens=12, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    return generate(llm, PROMPTS, [greedy, sampled] * 2)


def structured(llm: LLM) -> Any:
    """Each kind of constraint, beside a free request, and under sampling."""
    base: dict[str, Any] = {"max_tokens": 60, "seed": 3, "top_k": 50}
    params = [
        SamplingParams(temperature=0, max_tokens=60, structured=StructuredOutput(json=SCHEMA)),
        SamplingParams(structured=StructuredOutput(regex=NAME), n=2, **base),
        SamplingParams(structured=StructuredOutput(choice=["red", "green", "blue"]), **base),
        SamplingParams(ignore_eos=True, **base),
    ]
    return generate(llm, PROMPTS, params)


def stop_strings(llm: LLM) -> Any:
    """The end of what greedy generation says after some tokens, and once more with it in the text."""
    base: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
    (free,) = llm.generate(PROMPTS[0], SamplingParams(**base))
    stop = free.outputs[0].text[10:14]
    params = [SamplingParams(stop=stop, **base), SamplingParams(stop=stop, include_stop_str_in_output=True, **base)]
    return generate(llm, [PROMPTS[0]] * 2, params)


def several_samples(llm: LLM) -> Any:
    return generate(llm, PROMPTS[:2], SamplingParams(n=3, seed=5, top_k=50, max_tokens=16, ignore_eos=True))


# Scheduling -----------------------------------------------------------------------------------------------------------


def more_than_fits(llm: LLM) -> Any:
    """Where the cache is small, requests are preempted; where a step is, prompts are cut."""
    mixed = [
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
        SamplingParams(top_k=30, seed=11, max_tokens=40, ignore_eos=True, repetition_penalty=1.2),
        SamplingParams(temperature=0, max_tokens=40, structured=StructuredOutput(regex="[a-z ]{40,60}")),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1, prompt_logprobs=1),
    ]
    return generate(llm, PROMPTS * 2, mixed * 2)


def preempted(llm: LLM) -> bool:
    """Whether any request was, so far: more_than_fits() comes before."""
    return llm.metrics().preemptions > 0


def known_prefixes(llm: LLM) -> Any:
    """The prompt's tokens that the second and third request need not compute: the whole blocks, to the last but one."""
    prompt = SHARED + "Portugal:"
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    generate(llm, [prompt], params)
    again, other = llm.generate([prompt, SHARED + "Italy:"], params)
    return [_plain(again), again.num_cached_tokens, _plain(other), other.num_cached_tokens]


def abort(llm: LLM) -> Any:
    """Leaves a call in its midst; the engine answers the next one, and holds nothing of the one before."""

    class Left(Exception):
        pass

    def leave(output: RequestOutput) -> None:
        raise Left

    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    short = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    try:
        llm.generate(PROMPTS, [long, long, short, long], on_output=leave)
    except Left:
        after = llm.metrics()
        return [after.running, after.waiting, after.blocks_used, greedy(llm)]
    raise AssertionError("the call went on")


# Pooling, weights, errors ---------------------------------------------------------------------------------------------


def embeddings(llm: LLM) -> Any:
    params = [PoolingParams(), PoolingParams(dimensions=8), PoolingParams(normalize=False), PoolingParams()]
    return [output.data for output in llm.embed(PROMPTS, params)]


def classes(llm: LLM) -> Any:
    return [output.data for output in llm.classify(PROMPTS)]


def new_weights(llm: LLM, other: str) -> Any:
    """Other weights, then those of before; sleep at both levels. Weights that do not fit are an error, and mended."""
    path = llm.config.model.path
    said: list[Any] = []
    for weights in (other, path):
        llm.update_weights(weights)
        said.append(greedy(llm))
    said.append(error(lambda: llm.update_weights([]))[:1])
    said.append(error(lambda: llm.generate("Hello")))
    llm.update_weights(path)
    for level in (1, 2):
        llm.sleep(level)  # type: ignore[arg-type]
        said.append(error(lambda: llm.generate("Hello")))
        llm.wake_up()
        said.append(greedy(llm))
    return said


def refused_requests(llm: LLM) -> Any:
    """Each costs the others nothing."""
    actions: list[Callable[[], object]] = [
        lambda: llm.generate(PROMPTS, SamplingParams(temperature=-1.0)),
        lambda: llm.generate(PROMPTS, SamplingParams(logit_bias={1 << 20: 1.0})),
        lambda: llm.generate([*PROMPTS, SHARED * 20]),
        lambda: llm.generate([[1 << 20]]),
        lambda: llm.generate(PROMPTS[0], SamplingParams(structured=StructuredOutput(regex="[a-"))),
        lambda: llm.embed(PROMPTS, PoolingParams(task="classify")),
        lambda: LLM("./no-such-model", distributed_executor_backend=llm.executor_info.executor),
    ]
    return [*map(error, actions), greedy(llm)]


def failing_workers(llm: LLM) -> Any:
    """A call that fails on the workers is the caller's; a step that fails there is the end of the engine."""
    executor = llm._engine._executor
    call = [error(lambda: executor.call("dance")), greedy(llm)]
    with suppress(HeadwayError):  # once it is over here, every other rank has what it was to generate above
        llm.generate(PROMPTS[0], SamplingParams(max_tokens=1))
    wrong = StepPlan(step=llm.metrics().steps, releases=[0], runs=np.array([0, 1], np.int32).tobytes())
    return [
        *call,
        error(lambda: executor.submit(wrong).result(timeout=30), first=True),
        error(lambda: llm.generate(PROMPTS))[:1],
        error(lambda: llm.generate(PROMPTS))[:1],
        error(executor.health)[:1],
    ]


SCENARIOS: dict[str, Callable[..., Any]] = {
    function.__name__.replace("_", " "): function
    for function in (
        greedy,
        seeded_samples,
        penalties,
        banned_and_favoured_tokens,
        logprobs,
        structured,
        stop_strings,
        several_samples,
        more_than_fits,
        preempted,
        known_prefixes,
        abort,
        embeddings,
        classes,
        new_weights,
        refused_requests,
        failing_workers,
    )
}
GENERATING = [name for name in SCENARIOS if name not in ("embeddings", "classes")]


# What scenarios say ---------------------------------------------------------------------------------------------------


def generate(llm: LLM, prompts: list[str], params: SamplingParams | list[SamplingParams]) -> Any:
    return [_plain(output) for output in llm.generate(prompts, params)]


def _plain(output: RequestOutput) -> Any:
    return [output.outputs, output.prompt_logprobs]


def error(action: Callable[[], object], *, first: bool = False) -> list[str]:
    """Type and message. Any of several ranks may be the first to say it. first: of what ended the engine, also where
    another rank was so early that the call found it ended."""
    try:
        action()
    except HeadwayError as raised:
        told = raised.__cause__ if first and isinstance(raised, EngineDead) else raised
        said = [told.kind, told.message] if isinstance(told, WorkerError) else [str(told)]
        return [type(told).__name__, *said]
    raise AssertionError("no error")


# What an engine leaves ------------------------------------------------------------------------------------------------


def what_there_is() -> dict[str, list[str]]:
    """Of this process. Not its sockets and epolls, which Ray opens and closes as it likes."""
    files = map(_target, os.listdir("/proc/self/fd"))
    maps = Path("/proc/self/maps").read_text().splitlines()
    own = sorted(name for name in files if not name.startswith(("socket:", "anon_inode:[event", "/proc")))
    return {
        "files": own,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "memory": [line.split()[-1] for line in maps if "/memfd:" in line or "/dev/shm/" in line],
        "children": child_processes(),
        "placement groups": _groups(),
    }


def what_is_left() -> Counter[str]:
    """Open files, of which shared memory is one, threads and child processes. To be compared with <=: what an earlier
    test left may go meanwhile."""
    threads = [re.sub(r"\d+", "", thread.name) for thread in threading.enumerate()]
    return Counter([*map(_target, os.listdir("/proc/self/fd")), *threads, *child_processes()])


def child_processes() -> list[str]:
    """Of this process, whichever thread started them."""
    found: list[str] = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # of a thread that has just ended; another has its children now
            found += (task / "children").read_text().split()
    return found


def left(before: dict[str, list[str]], pids: list[int], limit_s: float = 5.0) -> dict[str, Any]:
    """What there is now and was not before, once nothing is or the time is over; the processes that still run."""
    deadline = time.monotonic() + limit_s
    while True:
        now = what_there_is()
        more: dict[str, Any] = {kind: extra for kind, names in now.items() if (extra := _without(names, before[kind]))}
        if running := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            more["processes"] = running
        if not more or time.monotonic() > deadline:
            return more
        time.sleep(0.01)


def _without(names: list[str], known: list[str]) -> list[str]:
    rest = list(names)
    for name in known:
        if name in rest:
            rest.remove(name)
    return rest


def _target(fd: str) -> str:
    try:
        return re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{fd}"))
    except FileNotFoundError:  # the listing's own
        return "/proc"


def _groups() -> list[str]:
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    return [name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"]
