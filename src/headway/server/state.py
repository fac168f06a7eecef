"""What the endpoints of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headway.llm import AsyncLLM
from headway.llm.tools import ToolParser
from headway.messages import SamplingParams
from headway.server.errors import RETRY, ApiError
from headway.server.metrics import Board, RequestStats
from headway.server.options import ServeOptions
from headway.server.reading import ANSWER

if TYPE_CHECKING:
    from headway.server.tracing import Traces

DRAIN_S = 0.02
"""How late it may be seen that nothing runs any more."""


@dataclass(slots=True)
class State:
    """names: that the model answers to, the first in answers. front_end: its number among those of the server. looks:
    whether it is the one that writes down how the engines are. data_parallel_rank: the replica that a request is for.

    tasks: of requests that run. reading: bytes of bodies that have not come as a whole yet. draining: the server ends
    once no front end has requests. chat_template: in place of the model's. tools, thinks: what the chat template
    teaches of calls and reasoning.
    """

    llm: AsyncLLM
    options: ServeOptions
    names: list[str]
    board: Board
    front_end: int = 0
    looks: bool = True
    data_parallel_rank: int | None = None
    tasks: set[asyncio.Task[Any] | None] = field(default_factory=set[asyncio.Task[Any] | None])
    reading: int = 0
    draining: bool = False
    traces: Traces | None = None
    stats: RequestStats = field(init=False)
    chat_defaults: SamplingParams = field(init=False)
    completion_defaults: SamplingParams = field(init=False)
    chat_template: str | None = field(init=False)
    tools: ToolParser = field(init=False)
    thinks: bool = field(init=False)

    def __post_init__(self) -> None:
        self.stats = RequestStats(self.board.requests[self.front_end])
        path = self.options.chat_template
        self.chat_template = None if path is None else Path(path).read_text()
        template = "\n".join(self.llm.tokenizer.chat_templates.values()) if path is None else self.chat_template or ""
        self.tools = ToolParser(template)
        self.thinks = ANSWER in template
        self.completion_defaults = self.llm.get_default_sampling_params()
        self.chat_defaults = msgspec.structs.replace(self.completion_defaults, max_tokens=None)

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.names:
            message = f"model={name!r}: this server has {', '.join(self.names)}"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="model", code="model_not_found")

    @property
    def most(self) -> int:
        """How many requests may run or wait, in all front ends."""
        config = self.llm.config
        places = config.scheduler.max_num_seqs * config.parallel.data_parallel_size
        return places + self.options.max_waiting

    @contextmanager
    def room(self) -> Generator[None]:
        """For a request that takes the engine's time. ApiError if there is none."""
        if self.draining:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", headers=RETRY)
        if sum(self.board.unfinished.tolist()) >= self.most:
            message = (
                f"{self.most} requests run or wait, which is as many as may (max_waiting={self.options.max_waiting})"
            )
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, headers=RETRY)
        task = asyncio.current_task()
        self.tasks.add(task)
        self._count()
        try:
            yield
        finally:
            self.tasks.remove(task)
            self._count()

    def _count(self) -> None:
        self.board.unfinished[self.front_end] = len(self.tasks)

    def for_replica(self, rank: int) -> State:
        """For a request that names its replica."""
        state = copy(self)
        state.data_parallel_rank = rank
        return state

    async def drain(self) -> None:
        """Refuses new requests from now on, and waits for those that run, in other front ends too: until then who comes
        on a connection that is open is told."""
        self.draining = True
        while self.board.unfinished.any():
            await asyncio.sleep(DRAIN_S)

    def cut(self) -> None:
        """Their clients are told that the server ends."""
        for task in filter(None, self.tasks):
            task.cancel()
