"""The text side of engines in processes of their own: for callers in this process, and for front ends in others."""

from __future__ import annotations

import asyncio
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import msgspec

from headway.engine.launch import read_tokenizer
from headway.engine.local import LocalRun
from headway.engine.replicas import Replicas
from headway.engine.supervise import OnDeath, Run, Supervisor
from headway.engine.wire import EngineTicket
from headway.executor.ray import needs_ray
from headway.llm.frontend import Frontend, Resolved
from headway.messages.worker import WorkerInfo


@dataclass(frozen=True, slots=True)
class Seat:
    """What a front end in another process needs beside a socket of Supervisor.seat(); crosses as MessagePack.

    found: with the config of the engines as they started.
    """

    found: Resolved
    info: WorkerInfo

    def frontend(self) -> Frontend:
        config, facts = self.found.config, self.found.facts
        tokenizer, grammar = read_tokenizer(config, facts, self.found.tokenizer)
        return Frontend.over(config, self.info, facts, tokenizer, grammar, self.found.sampling)

    def join(self, link: socket.socket) -> tuple[Frontend, Replicas]:
        """What AsyncLLM.over takes, on the running event loop, which is to be the callers' own."""
        parallel, cache = self.found.config.parallel, self.found.config.cache
        loop = asyncio.get_running_loop()
        return self.frontend(), Replicas.over(link, parallel.data_parallel_size, loop, cache.enable_prefix_caching)


def start_engines(found: Resolved, on_death: OnDeath = "restart") -> tuple[Supervisor, Seat]:
    """data_parallel_size processes with an engine each. Returns once all models are loaded."""
    ticket = EngineTicket(replica=0, config=found.config, facts=found.facts, tokenizer=found.tokenizer)
    parallel = found.config.parallel
    supervisor = Supervisor(ticket, parallel.data_parallel_size, _run(parallel.data_parallel_backend), on_death)
    least = min(supervisor.ready, key=lambda ready: ready.config.model.max_model_len)
    config = replace(found.config, cache=least.config.cache, model=least.config.model)
    pids = [pid for ready in supervisor.ready for pid in ready.info.pids]
    return supervisor, Seat(replace(found, config=config), msgspec.structs.replace(least.info, pids=pids))


def _run(backend: str) -> type[Run]:
    if backend == "mp":
        return LocalRun
    with needs_ray("data_parallel_backend=ray"):
        from headway.engine.ray_launcher import RayRun
    return RayRun


def start_replicas(found: Resolved, on_death: OnDeath = "restart") -> tuple[Frontend, Replicas]:
    """For callers in this process. The tokenizer is read while the models load."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_tokenizer, found.config, found.facts, found.tokenizer)
        supervisor, seat = start_engines(found, on_death)
    try:
        tokenizer, grammar = reading.result()
    except BaseException:
        supervisor.close()
        raise
    config, info = seat.found.config, seat.info
    logging.getLogger("headway").info("%s: %s", config.model.served_model_name, info)
    return Frontend.over(config, info, found.facts, tokenizer, grammar, found.sampling), supervisor.client()
