"""Ranks that torchrun, or a launcher like it, has started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.executor.torchrun import free_port, torchrun
from tests.models.checkpoints import make_checkpoint

from headway import LLM, SamplingParams

SETTINGS: dict[str, Any] = {
    "distributed_executor_backend": "external_launcher",
    "tensor_parallel_size": 2,
    "max_model_len": 128,
    "max_num_seqs": 4,
    "threads": 1,
}

HEAD = f"""
import json, os, signal, sys, threading, time
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
DIFFERENT = {"seed": RANK, "async_scheduling": not RANK, "enforce_eager": not RANK}
refused = [error_of(lambda: LLM(MODEL, **SETTINGS, **{name: value})) for name, value in DIFFERENT.items()]
OWN = {"threads": 1 + RANK, "kv_cache_memory_bytes": (4 + RANK) << 20}
with LLM(MODEL, **SETTINGS | OWN) as llm:
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
tell(refused=refused, info=info, outputs=outputs, different=different, again=again, staged=staged)
"""
)

BROKEN = (
    HEAD
    + """
from headway.worker import worker
def no_disk(*_):
    raise ValueError("no disk")
if RANK == 1:
    worker.load_model = no_disk
tell(broken=error_of(lambda: LLM(MODEL, **SETTINGS)))
"""
)

KILLED = (
    HEAD
    + """
victim, SETTINGS["tensor_parallel_size"] = int(sys.argv[2]), int(sys.argv[3])
SETTINGS["pipeline_parallel_size"] = 2 // SETTINGS["tensor_parallel_size"]
llm = LLM(MODEL, **SETTINGS)
def last_words(output):
    if RANK == victim:
        os.kill(os.getpid(), signal.SIGKILL)
params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
short = SamplingParams(temperature=0, max_tokens=4)
died = error_of(lambda: llm.generate(["One", "Two"], [short, params], on_output=last_words))
llm.close()
workers = [thread for thread in threading.enumerate() if thread.name == "headway-worker"]
for thread in workers:
    thread.join(5)
tell(died=died, ended=not any(thread.is_alive() for thread in workers))
"""
)

LATE = (
    HEAD
    + """
SETTINGS["step_timeout_s"] = 1
with LLM(MODEL, **SETTINGS) as llm:
    if RANK == 0:
        late = error_of(lambda: llm.generate("Alone"))
        open(f"{OUT}/given-up", "w").close()
    while not os.path.exists(f"{OUT}/given-up"):
        time.sleep(0.05)
    again = error_of(lambda: llm.generate("Too late"))
llm = LLM(MODEL, **SETTINGS)
def stop(output):
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
short = SamplingParams(temperature=0, max_tokens=4)
stopped = error_of(lambda: llm.generate(["One", "Two"], [short, params], on_output=stop))
tell(late=late, again=again, stopped=stopped)
os._exit(0)  # its worker waits for a process that has not ended
"""
)

UPDATED = (
    HEAD
    + """
from safetensors.torch import load_file
SETTINGS |= {"pipeline_parallel_size": 2, "tokenizer": sys.argv[4]}
prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (40, 3, 17)]
params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
with LLM(sys.argv[2], **SETTINGS) as llm:
    tokens = [[o.outputs[0].token_ids for o in llm.generate(prompts, params)]]
    llm.update_weights(load_file(sys.argv[3] + "/model.safetensors").items())
    tokens += [[o.outputs[0].token_ids for o in llm.generate(prompts, params)]]
tell(tokens=tokens)
"""
)


MEETS = """
import os, sys, time
from headway.executor import peers
RANK, OUT = int(os.environ["RANK"]), sys.argv[1]

def until_has_met(rank):
    while not os.path.exists(f"{OUT}/{rank}"):
        time.sleep(0.01)

call = peers._call
def call_late(*args):
    until_has_met(0)
    return call(*args)
if RANK == 3:
    peers._call = call_late
peers.join(f"replica {RANK // 2}", RANK % 2, 2)
open(f"{OUT}/{RANK}", "w").close()
for rank in range(4):
    until_has_met(rank)
"""


def said(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


def told(folder: Path, size: int, script: str, *args: str) -> list[dict[str, Any]]:
    """What each rank under torchrun has told."""
    (folder / "script.py").write_text(script)
    torchrun(size, [str(folder / "script.py"), str(folder), *args])
    return [said(folder, rank) for rank in range(size)]


@contextlib.contextmanager
def launched(folder: Path, script: str, *args: str, size: int = 2) -> Generator[list[subprocess.Popen[bytes]]]:
    """Ranks whose launcher has no store for them, and does nothing when one fails."""
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(folder / "script.py"), str(folder), *args]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(size)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_ranks_under_torchrun_agree_and_give_the_same_outputs(tmp_path: Path) -> None:
    ranks = told(tmp_path, 2, TOGETHER)

    for rank in ranks:
        for refused, name in zip(rank["refused"], ("seed", "async_scheduling", "enforce_eager"), strict=True):
            assert (
                refused[0] == "ConfigError" and name in refused[1] and "every rank must be given the same" in refused[1]
            )

    assert ranks[0]["info"][1] == ranks[1]["info"][1]
    assert "executor external_launcher (given): 2 ranks of 1 thread" in ranks[0]["info"][0]
    assert ranks[0]["outputs"] == ranks[1]["outputs"]
    assert [len(tokens) for tokens, _ in ranks[0]["outputs"]] == [12] * 9

    assert ranks[0]["staged"] == ranks[1]["staged"]
    first, after_sleep = ranks[0]["staged"]
    assert first == after_sleep and "Logprob" in first[0][1]

    for rank in ranks:
        kind, message, seconds = rank["different"]
        assert kind == "EngineError" and "run different requests" in message
        assert seconds < 10
        assert rank["again"][0] == "EngineDead"


def test_a_rank_that_fails_to_load_is_an_error_on_every_rank(tmp_path: Path) -> None:
    with launched(tmp_path, BROKEN) as ranks:
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    for rank in range(2):
        assert said(tmp_path, rank)["broken"][:2] == ["WorkerError", "rank 1: ValueError: no disk"]


@pytest.mark.parametrize(("victim", "tensor_size"), [(0, 2), (0, 1), (1, 1)])
def test_a_killed_rank_is_an_error_on_the_other_and_lets_it_end(victim: int, tensor_size: int, tmp_path: Path) -> None:
    with launched(tmp_path, KILLED, str(victim), str(tensor_size)) as ranks:
        assert ranks[victim].wait(60) == -signal.SIGKILL
        assert ranks[1 - victim].wait(20) == 0
    found = said(tmp_path, 1 - victim)
    assert found["died"][:2] == ["WorkerDied", f"rank {victim} ended"] and found["died"][2] < 5
    assert found["ended"]


def test_no_rank_waits_longer_than_the_step_timeout_for_one_that_is_late_or_stopped(tmp_path: Path) -> None:
    with launched(tmp_path, LATE) as ranks:
        assert ranks[0].wait(60) == 0
        assert ranks[1].poll() is None
    found = said(tmp_path, 0)
    for name, what in {"late": "the other ranks have not made this call", "stopped": "no result of step"}.items():
        kind, message, seconds = found[name]
        assert kind == "EngineError" and what in message and "within 1 s (step_timeout_s)" in message
        assert 1 <= seconds < 7
    assert found["again"][0] == "EngineDead"


def test_four_ranks_take_new_weights_and_generate_what_one_does(tmp_path: Path, smollm2_gguf: Path) -> None:
    model, first = make_checkpoint("llama", "ForCausalLM", tmp_path, vocab_size=2048)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flip(0))
    model.save_pretrained(tmp_path / "other")
    prompts: list[Any] = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (40, 3, 17)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    expected: list[list[list[int]]] = []
    for path in (first, tmp_path / "other"):
        with LLM(str(path), tokenizer=str(smollm2_gguf), threads=1, max_model_len=128, max_num_seqs=4) as llm:
            expected.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert expected[0] != expected[1]
    ranks = told(tmp_path, 4, UPDATED, str(first), str(tmp_path / "other"), str(smollm2_gguf))
    assert [rank["tokens"] for rank in ranks] == [expected] * 4


def test_replicas_meet_through_the_first_ranks_store_whenever_they_come(tmp_path: Path) -> None:
    with launched(tmp_path, MEETS, size=4) as ranks:
        assert ranks[3].wait(60) == 0


def test_a_launch_of_independent_replicas_needs_no_meeting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # where nobody listens
    settings = {**SETTINGS, "tensor_parallel_size": 1}
    params = SamplingParams(temperature=0, max_tokens=4)
    with LLM("smollm2-135m-instruct", **settings) as external, LLM("smollm2-135m-instruct", threads=1) as uni:
        ours, theirs = (llm.generate("The capital of France is", params)[0].outputs[0] for llm in (external, uni))
        assert ours.token_ids == theirs.token_ids
