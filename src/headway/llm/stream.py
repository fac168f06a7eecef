"""Many prompts of one event loop, answered as they finish, at a fraction of what a coroutine for each would cost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from headway.engine.port import EngineClient, Item
from headway.errors import HeadwayError
from headway.llm.frontend import Frontend
from headway.llm.outputs import Result, make_result
from headway.llm.processor import Params
from headway.llm.prompts import Prompt
from headway.messages import PooledOutput, Request, RequestOutput

K = TypeVar("K", bound=Hashable)

Answer = RequestOutput | PooledOutput | BaseException
OnAnswers = Callable[[list[tuple[K, Answer]]], None]


@dataclass(slots=True, eq=False)
class _Entry(Generic[K]):
    """names: of its requests."""

    key: K
    names: list[str]
    result: Result


class PromptStream(Generic[K]):
    """done: called on the event loop with the keys of prompts and what became of each, once for every prompt.

    That is an output, the RequestError of a prompt that cannot be honoured, or what ended the engine.
    """

    def __init__(self, frontend: Frontend, engine: EngineClient, ids: Iterator[str], done: OnAnswers[K]) -> None:
        self._frontend, self._engine, self._ids, self._done = frontend, engine, ids, done
        self._running: dict[str, _Entry[K]] = {}  # a prompt of n samples is there n times
        self._answers: list[tuple[K, Answer]] = []

    def submit(self, keys: Sequence[K], prompts: Sequence[Prompt], params: Sequence[Params]) -> None:
        """One of each a prompt. Tokenises them here and now."""
        requests: list[Request] = []
        for key, one in zip(keys, self._frontend.processor.prepare_each(self._ids, prompts, params), strict=True):
            if isinstance(one, BaseException):
                self._answer(key, one)
                continue
            names = [request.request_id for request in one.requests]
            entry = _Entry(key, names, make_result(self._frontend.tokenizer, one))
            self._running.update(dict.fromkeys(names, entry))
            requests += one.requests
        try:
            self._engine.submit(requests, self._take)
        except HeadwayError as error:  # it is dead
            for request in requests:
                self._take(request.request_id, error)

    def drop(self, keys: Container[K]) -> None:
        """Ends what still runs of them; nobody hears of it."""
        self._end([name for name, entry in self._running.items() if entry.key in keys])

    def close(self) -> None:
        """Ends what still runs; nobody hears of it."""
        self._end(list(self._running))

    def _end(self, names: list[str]) -> None:
        for name in names:
            del self._running[name]
        with suppress(HeadwayError):  # it is dead
            self._engine.abort(names)

    def _take(self, request_id: str, item: Item) -> None:
        entry = self._running.get(request_id)
        if entry is None:
            return
        if isinstance(item, BaseException):
            self._drop(entry, item)
            return
        try:
            output, must_abort = entry.result.feed(item)
        except Exception as error:  # whatever it is: the others of the step are to have theirs
            self._drop(entry, error)
            return
        if must_abort or item.finish_reason is not None:
            del self._running[request_id]
        if output is not None:
            self._answer(entry.key, output)
        if must_abort:
            with suppress(HeadwayError):  # it is dead
                self._engine.abort([request_id])

    def _drop(self, entry: _Entry[K], error: BaseException) -> None:
        """A prompt with all its samples."""
        for name in entry.names:
            self._running.pop(name, None)
        self._answer(entry.key, error)

    def _answer(self, key: K, answer: Answer) -> None:
        """What a step of the engine gives comes at a time."""
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._flush)
        self._answers.append((key, answer))

    def _flush(self) -> None:
        answers, self._answers = self._answers, []
        self._done(answers)
