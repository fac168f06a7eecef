"""Rank processes for tests: each runs the same functions on a worker of its own, as an executor would make it."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from tests.worker.driver import Driver

from headway.config.settings import EngineConfig, ParallelConfig
from headway.messages import PoolingParams, RankGroup, SamplingParams
from headway.worker import Worker

Job = Callable[..., Any]
TIMEOUT_S = 120


class RankError(Exception):
    """An error on a rank, as "Type: message"."""


class Ranks:
    """``run`` calls job(worker, *args) on every rank at once; ``processes`` may be killed."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.processes = [
            context.Process(target=_serve, args=(rank, pipes[rank][1]), daemon=True) for rank in range(size)
        ]
        self.pipes: list[Connection] = [mine for mine, _ in pipes]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def load(self, config: EngineConfig, *, shared: bool = True) -> list[bool]:
        """A worker of tensor_parallel_size ranks on each; whether it has a program."""
        config = replace(config, parallel=ParallelConfig(tensor_parallel_size=len(self.processes)))
        memory = os.memfd_create("ranks") if shared else None
        path = None if memory is None else f"/proc/{os.getpid()}/fd/{memory}"
        try:
            return self.run(_load, config, path, f"127.0.0.1:{_free_port()}")
        finally:
            if memory is not None:
                os.close(memory)

    def run(self, job: Job, *args: Any) -> list[Any]:
        self.send(job, *args)
        return [self.receive(rank) for rank in range(len(self.pipes))]

    def send(self, job: Job, *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((job, args))

    def receive(self, rank: int) -> Any:
        assert self.pipes[rank].poll(TIMEOUT_S), f"rank {rank} does not answer"
        result, error = self.pipes[rank].recv()
        if error is not None:
            raise RankError(error)
        return result

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(TIMEOUT_S)
            process.kill()
            process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _serve(rank: int, pipe: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    worker: list[Any] = [rank, None]
    while True:
        try:
            job, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((job(worker, *args), None))
        except Exception as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))


def _load(state: list[Any], config: EngineConfig, path: str | None, store: str) -> bool:
    rank, old = state
    if old is not None:
        old.close()
    memory = None if path is None else os.open(path, os.O_RDWR)
    group = RankGroup(rank=rank, size=config.parallel.tensor_parallel_size, memory=memory, store=store, engine="")
    state[1] = Worker(config, rank, group)
    return state[1].load().program


def generate(state: list[Any], prompts: list[list[int]], params: list[SamplingParams], num_tokens: int) -> Any:
    """What Driver.generate finds, and every report of log probabilities."""
    driver = Driver(state[1])
    for slot, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        driver.add(slot, prompt, sampling=sampling, seed=slot)
    tokens = driver.generate(num_tokens, chunk=7)
    reports = [(s.logprobs, s.prompt_logprobs) for s in driver.sequences.values()]
    for slot in list(driver.sequences):
        driver.release(slot)
    driver.step({})
    return tokens, reports


def embed(state: list[Any], prompts: list[list[int]]) -> list[torch.Tensor]:
    """One vector a prompt."""
    driver = Driver(state[1])
    for slot, prompt in enumerate(prompts):
        driver.add(slot, prompt, pooling=PoolingParams())
    pooled = driver.step({slot: len(prompt) for slot, prompt in enumerate(prompts)}).pooled
    return [torch.frombuffer(bytearray(pooled[slot]), dtype=torch.float32) for slot in range(len(prompts))]
