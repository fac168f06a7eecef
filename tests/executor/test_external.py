"""Two ranks that torchrun, or a launcher like it, has started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headway import LLM, SamplingParams

SETTINGS: dict[str, Any] = {
    "distributed_executor_backend": "external_launcher",
    "tensor_parallel_size": 2,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "threads": 1,
}

HEAD = f"""
import json, os, sys, time
from headway import LLM, SamplingParams, StructuredOutput
from headway.errors import HeadwayError
RANK = int(os.environ["RANK"])
MODEL, OUT = "smollm2-135m-instruct", sys.argv[1]
SETTINGS = {SETTINGS!r}

def error_of(action):
    began = time.monotonic()
    try:
        action()
    except HeadwayError as error:
        return [type(error).__name__, str(error), time.monotonic() - began]

def tell(**said):
    with open(f"{{OUT}}/{{RANK}}.json", "w") as file:
        json.dump(said, file)
"""

TOGETHER = (
    HEAD
    + """
other_seed = error_of(lambda: LLM(MODEL, **SETTINGS, seed=RANK))
with LLM(MODEL, **SETTINGS, kv_cache_memory_bytes=(4 + RANK) << 20) as llm:
    info = [str(llm.executor_info), llm.executor_info.num_blocks]
    prompts = ["The capital of France is", "Once upon a time", "def add(a, b):"] * 3
    params = [SamplingParams(temperature=t, max_tokens=12, logprobs=2) for t in (0, 0.8, 1)] * 3
    outputs = [[c.token_ids, str(c.logprobs)] for o in llm.generate(prompts, params) for c in o.outputs]
    different = error_of(lambda: llm.generate(["Yes", "No"][RANK]))
    again = error_of(lambda: llm.generate("Yes"))
with LLM(MODEL, **SETTINGS | {"tensor_parallel_size": 1, "pipeline_parallel_size": 2}) as llm:
    params = [
        SamplingParams(temperature=0, max_tokens=8, logprobs=2),
        SamplingParams(temperature=1, max_tokens=8, seed=1),
        SamplingParams(temperature=0, max_tokens=8, structured=StructuredOutput(regex="[a-f]+")),
    ]
    staged = [[[o.outputs[0].token_ids, str(o.outputs[0].logprobs)] for o in llm.generate(prompts[:3], params)]]
    llm.sleep(2)
    llm.wake_up()
    staged += [[[o.outputs[0].token_ids, str(o.outputs[0].logprobs)] for o in llm.generate(prompts[:3], params)]]
tell(other_seed=other_seed, info=info, outputs=outputs, different=different, again=again, staged=staged)
"""
)

LONELY = (
    HEAD
    + """
from headway.worker import worker
def no_disk(*_):
    raise ValueError("no disk")
load = worker.load_model
if RANK == 1:
    worker.load_model = no_disk
broken = error_of(lambda: LLM(MODEL, **SETTINGS))
worker.load_model = load

llm = LLM(MODEL, **SETTINGS)
def last_words(output):
    if RANK == 1:
        os.kill(os.getpid(), 9)
params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
short = SamplingParams(temperature=0, max_tokens=4)
tell(broken=broken, died=error_of(lambda: llm.generate(["One", "Two"], [short, params], on_output=last_words)))
"""
)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def said(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


def test_ranks_under_torchrun_agree_and_give_the_same_outputs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOGETHER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    subprocess.run([*launch, str(script), str(tmp_path)], check=True, timeout=120)
    ranks = [said(tmp_path, rank) for rank in range(2)]

    assert {name for rank in ranks if (name := rank["other_seed"][0])} <= {"ConfigError", "WorkerError"}
    assert any("every rank must be given the same" in rank["other_seed"][1] for rank in ranks)

    assert ranks[0]["info"] == ranks[1]["info"]
    assert "executor external_launcher (given): 2 ranks of 1 thread" in ranks[0]["info"][0]
    assert ranks[0]["outputs"] == ranks[1]["outputs"]
    assert [len(tokens) for tokens, _ in ranks[0]["outputs"]] == [12] * 9

    assert ranks[0]["staged"] == ranks[1]["staged"]
    first, after_sleep = ranks[0]["staged"]
    assert first == after_sleep and "Logprob" in first[0][1]

    for rank in ranks:
        kind, message, seconds = rank["different"]
        assert kind in ("EngineError", "WorkerError") and "run different requests" in message
        assert seconds < 10
        assert rank["again"][0] == "EngineDead"


def test_a_rank_that_fails_or_dies_is_an_error_on_the_others(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(LONELY)
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
            | {"MASTER_ADDR": "127.0.0.1"},
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].wait(60) == -signal.SIGKILL
        assert ranks[0].wait(20) == 0
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    errors = said(tmp_path, 0)
    assert errors["broken"][:2] == ["WorkerError", "rank 1: ValueError: no disk"]
    assert errors["died"][:2] == ["WorkerDied", "rank 1 ended"] and errors["died"][2] < 30


def test_a_launch_of_independent_replicas_needs_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # where nobody listens
    settings = {**SETTINGS, "tensor_parallel_size": 1}
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM("smollm2-135m-instruct", **settings) as external, LLM("smollm2-135m-instruct", threads=1) as uni:
        ours, theirs = (llm.generate("The capital of France is", params)[0].outputs[0] for llm in (external, uni))
        assert ours.token_ids == theirs.token_ids
