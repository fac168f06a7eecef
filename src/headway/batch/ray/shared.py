"""An engine that processors share on Ray: a named actor with a flow of its own, to which workers send their rows."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from headway.batch.config import StageConfig
from headway.batch.engines import Lease
from headway.batch.flow import Fail
from headway.batch.ray.admission import Reopened
from headway.batch.ray.blocks import new_of
from headway.batch.ray.settle import settle_in
from headway.batch.row import Done, Row, RowError
from headway.batch.specs import EngineSpec

MAX_TASK_RETRIES = 5
"""Times that the same rows may lose an actor's process, so that rows that kill it end the job."""
_CLOSE_S = 10.0

Answered = list[tuple[dict[str, Any], RowError | None]]


class SharedEngine:
    """The actor. Its engine starts with the first rows."""

    def __init__(self, spec: EngineSpec, own_threads: bool) -> None:
        if not own_threads:
            settle_in()
        self._flow = Reopened([spec])

    async def answer(self, rows: list[dict[str, Any]]) -> Answered:
        """What is new of each, in order."""
        answered = [Row.of(i, data) for i, data in enumerate(rows)]
        await self._flow.answer(answered, lambda _: None)
        return [(new_of(row), row.error) for row in answered]

    async def close(self) -> None:
        await self._flow.close()


class _Owner:
    """Of the actor, in the program that made the processors."""

    def __init__(self, spec: EngineSpec, options: dict[str, Any], own_threads: bool) -> None:
        actor: Any = ray.remote(SharedEngine).options(
            name=f"headway-{spec.config.shared}-{secrets.token_hex(4)}",
            max_restarts=-1,
            max_task_retries=MAX_TASK_RETRIES,
            **{name: value for name, value in options.items() if value is not None},
        )
        self.actor = actor.remote(spec, own_threads)

    def close(self) -> None:
        if ray.is_initialized():
            with suppress(RayError):
                ray.get(self.actor.close.remote(), timeout=_CLOSE_S)
            ray.kill(self.actor)


class _Kept:
    """Keeps a lease as long as a dataset refers to it; workers get none of it."""

    def __init__(self, lease: Lease | None = None) -> None:
        self.lease = lease

    def __reduce__(self) -> Any:
        return _Kept, ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedSpec:
    """See ``headway.batch.ray.admission.Makes``."""

    actor: Any
    kept: _Kept
    workers: StageConfig = field(default_factory=StageConfig)

    def make(self) -> SharedStage:
        return SharedStage(self.actor)


def shared(spec: EngineSpec, lease: Lease, options: dict[str, Any], own_threads: bool) -> SharedSpec:
    """Makes the actor unless other processors have. It is there as long as one of their leases is."""
    owner = lease.elsewhere(lambda: _Owner(spec, options, own_threads))
    return SharedSpec(actor=owner.actor, kept=_Kept(lease))


class SharedStage:
    """A call for the rows that come together: inside the engine each goes its own way."""

    name = "engine"
    window = 1 << 20  # the actor bounds how many are in its engine

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._calls: set[asyncio.Task[None]] = set()

    async def open(self, fail: Fail) -> None:
        self._fail = fail

    def submit(self, rows: list[Row], done: Done) -> None:
        call = asyncio.get_running_loop().create_task(self._ask(rows, done))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def close(self) -> None:
        for call in self._calls:
            call.cancel()

    async def _ask(self, rows: list[Row], done: Done) -> None:
        try:
            answers: Answered = await self._actor.answer.remote([row.data for row in rows])
        except Exception as error:
            self._fail(error)
            return
        for row, (new, error) in zip(rows, answers, strict=True):
            row.data |= new
            row.error = error
        done(rows)
