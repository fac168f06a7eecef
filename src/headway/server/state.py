"""What the endpoints of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

import msgspec

from headway.llm import AsyncLLM
from headway.llm.tools import ToolParser
from headway.messages import SamplingParams
from headway.server.errors import ApiError
from headway.server.metrics import RequestStats
from headway.server.options import ServeOptions
from headway.server.reading import ANSWER

RETRY_AFTER_S = 1


@dataclass(slots=True)
class State:
    """names: that the model answers to, the first in answers. draining: the server ends once nothing runs.

    chat_template: in place of the model's. tools, thinks: what the chat template teaches of calls and reasoning.
    """

    llm: AsyncLLM
    options: ServeOptions
    names: list[str]
    running: int = 0
    draining: bool = False
    stats: RequestStats = field(default_factory=RequestStats)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    chat_defaults: SamplingParams = field(init=False)
    completion_defaults: SamplingParams = field(init=False)
    chat_template: str | None = field(init=False)
    tools: ToolParser = field(init=False)
    thinks: bool = field(init=False)

    def __post_init__(self) -> None:
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
        """How many requests may run or wait."""
        return self.llm.config.scheduler.max_num_seqs + self.options.max_waiting

    @contextmanager
    def room(self) -> Generator[None]:
        """For a request that takes the engine's time. ApiError if there is none."""
        retry = {"retry-after": str(RETRY_AFTER_S)}
        if self.draining:
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "the server is shutting down", headers=retry)
        if self.running >= self.most:
            message = (
                f"{self.most} requests run or wait, which is as many as may (max_waiting={self.options.max_waiting})"
            )
            raise ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, headers=retry)
        self.running += 1
        self.idle.clear()
        try:
            yield
        finally:
            self.running -= 1
            if not self.running:
                self.idle.set()

    async def drain(self) -> None:
        """Refuses new requests from now on, and waits for those that run."""
        self.draining = True
        if self.running:
            await self.idle.wait()
