"""Engines in processes of their own as one: routes requests, sends those of a lost replica to another, adds up."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from headway.engine.metrics import EngineMetrics
from headway.engine.port import EngineClient, Health, Item, Stream
from headway.engine.remote import RemoteEngine, Sent
from headway.engine.replay import GONE, Act, Replay
from headway.engine.routing import Router
from headway.engine.upkeep import as_file
from headway.engine.wire import Method, Status, decode_status
from headway.errors import EngineDead, EngineError, HeadwayError, RequestError
from headway.executor.channel.wire import Address

if TYPE_CHECKING:
    from headway.engine.upkeep import Weights

_MOST_BYTES = 1 << 16  # of a status
TRIES = 2
"""How often a request is sent at most: one that kills engines must not kill them all."""


class Replicas(EngineClient):
    """Hears of replicas through tell(). Its state belongs to one event loop, which may be the callers' own."""

    def __init__(
        self,
        count: int,
        loop: asyncio.AbstractEventLoop,
        prefixes: bool = True,
        release: Callable[[float], None] = lambda timeout: None,
    ) -> None:
        """prefixes: whether the engines keep those. release: what close() calls at its end, with the seconds left."""
        super().__init__()
        self._loop, self._release = loop, release
        self._router = Router(prefixes)
        self._up: dict[int, RemoteEngine] = {}
        self._why = ["it has not started yet"] * count
        self._requests: dict[str, Sent] = {}
        self._past = [EngineMetrics()] * count  # of processes that are no more
        self._coming: dict[int, RemoteEngine] = {}  # not like the others yet
        self._replay, self._acting = Replay(), asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @classmethod
    def over(cls, link: socket.socket, count: int, loop: asyncio.AbstractEventLoop, prefixes: bool = True) -> Replicas:
        """Over the engines of the supervisor, in another process, that ``link`` leads to: see Supervisor.seat()."""

        def release(_: float) -> None:
            loop.remove_reader(link)
            link.close()

        def hear() -> None:
            if data := link.recv(_MOST_BYTES):
                replicas._take_status(decode_status(data))
            else:
                loop.remove_reader(link)
                replicas._end(EngineDead("the process that keeps the engines has ended"))

        replicas = cls(count, loop, prefixes, release)
        for _ in range(count):
            replicas._take_status(decode_status(link.recv(_MOST_BYTES)))
        loop.add_reader(link, hear)
        return replicas

    def tell(self, status: Status) -> None:
        """From any thread: what the supervisor says."""
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(self._take_status, status)

    async def update_weights(self, weights: Weights) -> None:
        await self._on_loop(self._update_weights(weights))

    async def sleep(self, level: Literal[1, 2]) -> None:
        await self._on_loop(self._act("sleep", level))

    async def wake_up(self) -> None:
        await self._on_loop(self._act("wake_up"))

    def replica_metrics(self) -> list[EngineMetrics]:
        there = self._coming | self._up
        return [past + there[replica].metrics if replica in there else past for replica, past in enumerate(self._past)]

    def health(self) -> list[Health]:
        return [Health(replica, not why, why) for replica, why in enumerate(self._why)]

    def close(self, timeout: float = 5.0) -> None:
        """Not to be called on its own event loop, unless that is the callers'."""
        with self._gate:
            closed, self._closed = self._closed, True
        if not closed:
            self._soon(self._end, EngineDead("the engine was closed"))
            if not self._is_here():
                self.ended.result()
            self._release(timeout)

    def _soon(self, act: Callable[..., None], *args: Any) -> None:
        if self._is_here():
            act(*args)
        else:
            self._loop.call_soon_threadsafe(act, *args)

    def _is_here(self) -> bool:
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    async def _on_loop(self, work: Coroutine[Any, Any, None]) -> None:
        """Whoever waits for it may be cancelled: what some replicas have done already is done on all."""
        await asyncio.shield(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop)))

    # The event loop ---------------------------------------------------------------------------------------------------

    def _enter(self, streams: list[Stream]) -> None:
        refused: list[tuple[Stream, Item]] = []
        entering: list[Sent] = []
        for stream in streams:
            name = stream.request.request_id
            if name in self._requests:
                refused.append((stream, RequestError("request_id", name, "is in use")))
            else:
                self._requests[name] = Sent(stream)
                entering.append(self._requests[name])
        self._deliver(refused)
        self._send(entering)

    def _send(self, batch: list[Sent]) -> None:
        """Each to a replica."""
        chosen: dict[RemoteEngine, list[Sent]] = {}
        failed: list[tuple[Sent, Item]] = []
        loads = {replica: remote.load for replica, remote in self._up.items()}
        for sent in batch:
            try:
                replica = self._route(sent, loads)
            except EngineDead as error:
                failed.append((sent, error))
                continue
            loads[replica] += 1
            chosen.setdefault(self._up[replica], []).append(sent)
        for remote, entering in chosen.items():
            failed += _submit(remote, entering)
        self._arrived(failed)

    def _route(self, sent: Sent, loads: dict[int, int]) -> int:
        rank = sent.stream.request.data_parallel_rank
        if rank is not None:
            if rank not in loads:
                raise EngineDead(f"replica {rank} does not run: {self._why[rank]}")
            return rank
        if not loads:
            why = "; ".join(f"replica {replica}: {why}" for replica, why in enumerate(self._why))
            raise EngineDead(f"no replica runs: {why}")
        return self._router.route(sent.stream.request, loads)

    def _leave(self, streams: list[Stream]) -> None:
        left: dict[RemoteEngine, list[Sent]] = {}
        for stream in streams:
            sent = self._requests.get(stream.request.request_id)
            if sent is not None and sent.stream is stream and sent.remote is not None:
                del self._requests[stream.request.request_id]
                left.setdefault(sent.remote, []).append(sent)
        for remote, batch in left.items():
            remote.forget(batch)

    def _abort(self, request_ids: list[str]) -> None:
        for sent in filter(None, map(self._requests.get, request_ids)):
            assert sent.remote is not None
            sent.remote.abort([sent])
            sent.tries = TRIES  # should that replica die now, no other one runs it

    def _arrived(self, items: list[tuple[Sent, Item]]) -> None:
        for sent, item in items:
            if isinstance(item, BaseException) or item.finish_reason is not None:
                del self._requests[sent.stream.request.request_id]
        self._deliver([(sent.stream, item) for sent, item in items])

    def _deliver(self, items: list[tuple[Stream, Item]]) -> None:
        if lost := self._outbox.send(items):
            self._leave(lost)

    # Replicas that come and go ----------------------------------------------------------------------------------------

    def _take_status(self, status: Status) -> None:
        if self.ended.done():
            return
        if status.address is None:
            self._lose(status.replica, status.why)
            if status.final:
                self._end(EngineDead(f"replica {status.replica}: {status.why}"))
            return
        remote = self._dial(status.replica, status.address, [])
        if not self._replay.acts and not self._acting.locked():
            self._admit(remote)

    def _dial(self, replica: int, address: Address, did: list[Act]) -> RemoteEngine:
        """did: see RemoteEngine."""
        remote = RemoteEngine(self._loop, replica, address, did, self._arrived, self._died, self._lost)
        self._coming[replica] = remote
        task = self._loop.create_task(self._catch_up(remote))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return remote

    async def _catch_up(self, remote: RemoteEngine) -> None:
        await remote.greeted.wait()
        async with self._acting:
            if not self._is_coming(remote):
                return
            acts, why = [] if self._replay.acts == remote.did else self._replay.acts, ""
            if acts and not self._replay.fit:
                acts, why = [], "it has the weights that it was started with: update_weights() first"
            try:
                for method, args in acts:
                    await remote.act(method, *args)
            except HeadwayError as error:
                why = f"it could not be brought to where the others are: {error}"
            if not self._is_coming(remote):
                return
            if why:
                self._why[remote.replica] = why
            else:
                self._admit(remote)

    def _is_coming(self, remote: RemoteEngine) -> bool:
        return self._coming.get(remote.replica) is remote

    def _admit(self, remote: RemoteEngine) -> None:
        del self._coming[remote.replica]
        self._up[remote.replica], self._why[remote.replica] = remote, ""

    def _died(self, remote: RemoteEngine, why: str) -> None:
        if remote in (self._up.get(remote.replica), self._coming.get(remote.replica)):
            self._lose(remote.replica, why)

    def _lost(self, remote: RemoteEngine) -> None:
        """Not so on one node: there that means its end, of which the supervisor tells more."""
        replica, coming = remote.replica, self._is_coming(remote)
        if remote.address.endpoint.startswith("tcp:") and (coming or self._up.get(replica) is remote):
            past = self._past[replica]
            self._lose(replica, "the connection was lost")
            again = self._dial(replica, remote.address, remote.did if coming else self._replay.acts)
            self._past[replica], again.metrics = past, _counted(remote.metrics)  # its process goes on counting

    def _lose(self, replica: int, why: str) -> None:
        """Requests that gave nothing yet go to another one."""
        self._why[replica] = why
        remote = self._up.pop(replica, None) or self._coming.pop(replica, None)
        if remote is None:
            return
        self._past[replica] += _counted(remote.metrics)
        self._router.forget(replica)
        again: list[Sent] = []
        failed: list[tuple[Sent, Item]] = []
        for sent in remote.close(why):
            if self._up and not sent.started and sent.tries < TRIES and sent.stream.request.data_parallel_rank is None:
                again.append(sent)
            else:
                failed.append((sent, EngineDead(f"replica {replica}: {why}")))
        self._arrived(failed)
        self._send(again)

    def _end(self, error: BaseException) -> None:
        if self.ended.done():
            return
        with self._gate:
            self.ended.set_result(error)
        for replica, remote in [*self._up.items(), *self._coming.items()]:
            remote.close(str(error))
            self._why[replica] = str(error)
            self._past[replica] += _counted(remote.metrics)
        self._up, self._coming = {}, {}
        self._arrived([(sent, error) for sent in self._requests.values()])

    async def _update_weights(self, weights: Weights) -> None:
        with ExitStack() as entered:
            path = await asyncio.to_thread(entered.enter_context, as_file(weights))
            await self._act("update_weights", path)
            if not isinstance(weights, (str, PathLike)):
                self._replay.done("update_weights", GONE)

    async def _act(self, method: Method, *args: int | str) -> None:
        """On all replicas that run; those that start again, even because they died of it, catch up."""
        async with self._acting:
            if self._requests:
                raise EngineError("requests are running: wait for their end, or abort them")
            coming = [remote for remote in self._coming.values() if remote.greeted.is_set()]
            coming = coming if method == "update_weights" else []  # what they lack
            remotes = [*self._up.values(), *coming]
            if not remotes:
                raise EngineDead("no replica runs")
            results = await asyncio.gather(*(remote.act(method, *args) for remote in remotes), return_exceptions=True)
            failed = [result for result in results if isinstance(result, BaseException)]
            for error in failed:
                if len(failed) == len(results) or not isinstance(error, EngineDead):
                    raise error
            self._replay.done(method, *args)
            for remote in filter(self._is_coming, coming):
                self._admit(remote)


def _counted(metrics: EngineMetrics) -> EngineMetrics:
    """What stays of it when nothing runs."""
    return msgspec.structs.replace(metrics, running=0, waiting=0, blocks_used=0, blocks_total=0)


def _submit(remote: RemoteEngine, batch: list[Sent]) -> list[tuple[Sent, Item]]:
    """Those that cannot be."""
    try:
        remote.submit(batch)
    except (OverflowError, TypeError, UnicodeError) as error:
        if len(batch) == 1:
            return [(batch[0], RequestError("request", batch[0].stream.request.request_id, str(error)))]
        return [failed for sent in batch for failed in _submit(remote, [sent])]
    return []
