"""Engines in processes of their own as one: routes requests, sends those of a lost replica to another, adds up."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine
from contextlib import ExitStack, suppress
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

from headway.engine.metrics import EngineMetrics
from headway.engine.port import EngineClient, Health, Item, Stream, send
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
        self._replay = Replay()
        self._tasks: set[asyncio.Task[None]] = set()
        self._gate = threading.RLock()  # orders a caller's look at what has ended and its message
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

    def enter(self, streams: list[Stream]) -> None:
        self._post(self._enter, streams)

    def leave(self, streams: list[Stream]) -> None:
        with suppress(EngineDead):
            self._post(self._leave, streams)

    def abort(self, request_ids: list[str]) -> None:
        self._post(self._abort, request_ids)

    async def update_weights(self, weights: Weights) -> None:
        with ExitStack() as entered:
            path = await asyncio.to_thread(entered.enter_context, as_file(weights))
            await self._on_loop(self._update_weights(path, isinstance(weights, (str, PathLike))))

    async def sleep(self, level: Literal[1, 2]) -> None:
        await self._on_loop(self._act("sleep", level))

    async def wake_up(self) -> None:
        await self._on_loop(self._act("wake_up"))

    def replica_metrics(self) -> list[EngineMetrics]:
        up = self._up.copy()
        return [past + up[replica].metrics if replica in up else past for replica, past in enumerate(self._past)]

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

    def _post(self, act: Callable[..., None], *args: Any) -> None:
        with self._gate:
            if self.ended.done():
                error = self.ended.result()
                raise EngineDead(f"the engine does not run: {error}") from error
            if self._closed:
                raise EngineDead("the engine does not run: it was closed")
            self._soon(act, *args)

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
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

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
            remote.submit(entering)
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

    def _arrived(self, items: list[tuple[Sent, Item]]) -> None:
        for sent, item in items:
            if isinstance(item, BaseException) or item.finish_reason is not None:
                del self._requests[sent.stream.request.request_id]
        self._deliver([(sent.stream, item) for sent, item in items])

    def _deliver(self, items: list[tuple[Stream, Item]]) -> None:
        if lost := send(items):
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
        if not self._replay.acts:
            self._admit(remote)

    def _dial(self, replica: int, address: Address, done: list[Act]) -> RemoteEngine:
        """done: what it knows of that the others did."""
        remote = RemoteEngine(self._loop, replica, address, self._arrived, self._died, self._lost)
        self._coming[replica] = remote
        task = self._loop.create_task(self._catch_up(remote, done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return remote

    async def _catch_up(self, remote: RemoteEngine, done: list[Act]) -> None:
        await remote.greeted.wait()
        acts, why = [] if self._replay.acts == done else self._replay.acts, ""
        if acts and not self._replay.fit:
            acts, why = [], "it has the weights that it was started with: update_weights() first"
        try:
            for method, args in acts:
                await remote.act(method, *args)
        except HeadwayError as error:
            why = f"it could not be brought to where the others are: {error}"
        if self._coming.get(remote.replica) is not remote:
            return
        if why:
            self._why[remote.replica] = why
        else:
            self._admit(remote)

    def _admit(self, remote: RemoteEngine) -> None:
        del self._coming[remote.replica]
        self._up[remote.replica], self._why[remote.replica] = remote, ""

    def _died(self, remote: RemoteEngine, why: str) -> None:
        if remote in (self._up.get(remote.replica), self._coming.get(remote.replica)):
            self._lose(remote.replica, why)

    def _lost(self, remote: RemoteEngine) -> None:
        """Not so on one node: there that means its end, of which the supervisor tells more."""
        if remote.address.endpoint.startswith("tcp:") and self._up.get(remote.replica) is remote:
            self._lose(remote.replica, "the connection was lost")
            self._dial(remote.replica, remote.address, self._replay.acts)

    def _lose(self, replica: int, why: str) -> None:
        """Requests that gave nothing yet go to another one."""
        self._why[replica] = why
        remote = self._up.pop(replica, None) or self._coming.pop(replica, None)
        if remote is None:
            return
        last = remote.metrics
        self._past[replica] += EngineMetrics(**{name: getattr(last, name) for name in _COUNTERS}, times=last.times)
        self._router.forget(replica)
        left = remote.close(why)
        again = [s for s in left if not s.started and s.tries < TRIES and s.stream.request.data_parallel_rank is None]
        if not self._up:
            again = []
        error = EngineDead(f"replica {replica}: {why}")
        self._arrived([(sent, error) for sent in left if sent not in again])
        self._send(again)

    def _end(self, error: BaseException) -> None:
        if self.ended.done():
            return
        with self._gate:
            self.ended.set_result(error)
        for replica, remote in [*self._up.items(), *self._coming.items()]:
            remote.close(str(error))
            self._why[replica] = str(error)
        self._past = self.replica_metrics()
        self._up, self._coming = {}, {}
        self._arrived([(sent, error) for sent in self._requests.values()])

    async def _update_weights(self, path: str, stays: bool) -> None:
        """stays: the file is there when a replica starts again."""
        await self._act("update_weights", path)
        if not stays:
            self._replay.done("update_weights", GONE)

    async def _act(self, method: Method, *args: int | str) -> None:
        """On all replicas that run; those that start again catch up."""
        if self._requests:
            raise EngineError("requests are running: wait for their end, or abort them")
        coming = list(self._coming.values()) if method == "update_weights" else []  # what they lack
        remotes = [*self._up.values(), *coming]
        if not remotes:
            raise EngineDead("no replica runs")
        results = await asyncio.gather(*(remote.act(method, *args) for remote in remotes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self._replay.done(method, *args)
        for remote in coming:
            if self._coming.get(remote.replica) is remote:
                self._admit(remote)


_COUNTERS = ("prompt_tokens", "generated_tokens", "prefix_hit_tokens", "preemptions", "steps")
