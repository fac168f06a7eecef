"""What goes to the workers and what comes back. No thread reads it: whoever waits takes in what there is for all."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one since Python 3.11
from typing import TYPE_CHECKING, Any

import msgspec

from headway.config import ParallelConfig
from headway.errors import EngineDead, EngineError, HeadwayError, PeerLost, WorkerDied
from headway.executor.channel import wire
from headway.executor.channel.shared import EngineEnd
from headway.executor.failure import error_of
from headway.messages import StepPlan, StepResult, WorkerInfo

if TYPE_CHECKING:
    from headway.executor.channel.tcp import Hub

_GRACE_S = 1.0  # for the cause of a failure whose consequences came in first


class StepFuture(Future[StepResult]):
    """A step's result. Who asks for it, on any thread, takes in what the workers have sent; nobody else does."""

    def __init__(self, mail: Mail, step: int) -> None:
        super().__init__()
        self._mail, self._step = mail, step

    def done(self) -> bool:
        self._mail.take()
        return super().done()

    def result(self, timeout: float | None = None) -> StepResult:
        self._wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return super().exception(0)

    def _wait(self, timeout: float | None) -> None:
        limit = self._mail.step_timeout
        if timeout is not None and (limit is None or timeout < limit):
            self._mail.wait(super().done, timeout)
        elif not self._mail.wait(super().done, limit):
            self._mail.stalled(f"no result of step {self._step}", f"{limit} s (step_timeout_s)")


class _Reply:
    """The answers to one call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.values: dict[int, Any] = {}
        self.error: BaseException | None = None

    def done(self) -> bool:
        return self.error is not None or len(self.values) == self._size


class Mail:
    """One engine's correspondence with its workers, used by any thread. After ``fail`` it is over.

    A rank that lost another one fails too, and may be heard first; so may the end of a process on another node be,
    before its explanation. Such suspects have a second in which the cause can come in.
    """

    def __init__(self, end: EngineEnd, parallel: ParallelConfig) -> None:
        """Its time limits are those after which a step, or a call, and with it the engine, is given up."""
        self.step_timeout = parallel.step_timeout_s or None
        self._call_timeout = parallel.start_timeout_s or None
        self.infos: dict[int, WorkerInfo] = {}
        self.error: HeadwayError | None = None
        self._size, self._end, self._reporter = parallel.ranks, end, parallel.reporting_rank
        self._hub: Hub | None = None
        self._remote: list[int] = []
        self._steps: dict[int, StepFuture] = {}
        self._calls: dict[int, _Reply] = {}
        self._ids = itertools.count()
        self._dead: dict[int, int | None] = {}
        self._suspects: list[HeadwayError] = []
        self._explained: set[int] = set()  # ranks whose end is no news
        self._verdict_at: float | None = None
        self._closing = False
        self._lock = threading.RLock()
        self._bell, self._bell_lock = end.engine_bell(1), threading.Lock()

    def open_tcp(self, hub: Hub, ranks: list[int]) -> None:
        """Those ranks are on other nodes."""
        self._hub, self._remote = hub, ranks

    def ring(self) -> None:
        """Wakes who waits, to look again."""
        with self._bell_lock:
            self._bell.ring()

    def died(self, rank: int, status: int | None) -> None:
        """A worker's process has ended. Never blocks."""
        self._dead[rank] = status
        self.ring()

    def submit(self, plan: StepPlan) -> StepFuture:
        future = StepFuture(self, plan.step)
        with self._lock:
            self._send(plan)
            self._steps[plan.step] = future
        return future

    def mask(self, step: int, masks: dict[int, bytes]) -> None:
        with self._lock:
            self._send(wire.Masks(step, masks))

    def close(self) -> bool:
        """Tells the workers to end, and EngineDead to whoever still waits. Whether the workers could be told."""
        self._closing = True
        self.ring()
        with self._lock:
            try:
                self._send(wire.Close())
            except EngineError:
                return False
            finally:
                self.fail(EngineDead("the executor was closed"))
        return True

    def call(self, method: str, args: tuple[Any, ...], timeout: float | None) -> list[Any]:
        """Every rank's answer in order. Raises what one raised, at once, and TimeoutError.

        Without a timeout a worker that does not answer within the limit for loading ends the engine.
        """
        reply, number = _Reply(self._size), next(self._ids)
        with self._lock:
            self._calls[number] = reply
            self._send(wire.Call(number, method, list(args)))
        try:
            if not self.wait(reply.done, self._call_timeout if timeout is None else timeout):
                if timeout is not None:
                    raise FutureTimeoutError(f"{method} took more than {timeout} s")
                silent = [rank for rank in range(self._size) if rank not in reply.values]
                self.stalled(f"no answer to {method}", f"{self._call_timeout} s (start_timeout_s)", silent)
        finally:
            with self._lock:
                self._calls.pop(number, None)
        if reply.error is not None:
            raise reply.error
        return [reply.values[rank] for rank in range(self._size)]

    def wait(self, done: Callable[[], bool], timeout: float | None) -> bool:
        """Whether ``done`` became true within timeout seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            seen = self._end.bell.value
            self.take()
            if done():
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            self._sleep(seen, deadline)

    def take(self) -> None:
        """Delivers what has come in. What cannot be understood, and a dead worker, are failures."""
        with self._lock:
            dead = dict(self._dead)  # first: what a worker wrote before its end explains it
            try:
                messages: list[tuple[int, bytes | None]] = [*self._end.receive()]
                if self._hub is not None:
                    messages += self._hub.receive()
                for rank, message in messages:
                    self._deliver(rank, message)
            except EngineError as error:
                self.fail(error)
            except BaseException as error:
                self._interrupted(error)
                raise
            for rank, status in dead.items():
                self._end.drop(rank)
                self._ended(rank, status)
            if self._verdict_at is not None and time.monotonic() >= self._verdict_at:
                self.fail(self._verdict())

    def stalled(self, what: str, limit: str, ranks: list[int] | None = None) -> None:
        """Ends it all: a time limit is over. ranks: that did not do it; not given: those that have plans to read."""
        with self._lock:
            if self._suspects:
                self.fail(self._verdict())
            names = ", ".join(map(str, ranks or self._end.behind() or [self._reporter]))
            self.fail(EngineError(f"rank {names}: {what} within {limit}"))

    def fail(self, error: HeadwayError) -> None:
        """The first failure is what everybody who waits is told."""
        with self._lock:
            if self.error is not None:
                return
            self.error, self._verdict_at = error, None
            for future in self._steps.values():
                future.set_exception(error)
            self._steps.clear()
            for reply in self._calls.values():
                reply.error = error
        self.ring()

    def check(self) -> None:
        """Raises EngineDead after a failure."""
        if self.error is not None:
            raise EngineDead(f"the workers failed before: {self.error}") from self.error

    def _send(self, message: wire.ToWorker) -> None:
        self.check()
        deadline = None if self.step_timeout is None else time.monotonic() + self.step_timeout
        data = wire.encode(message)
        try:
            self._end.send(data, lambda seen: self._wait_for_room(seen, deadline))
            for rank in self._remote:
                assert self._hub is not None
                self._hub.send(rank, data)
        except BaseException as error:
            self._interrupted(error)
            raise

    def _wait_for_room(self, seen: int, deadline: float | None) -> None:
        self.take()
        if self._closing:
            self.fail(EngineDead("the executor was closed"))
        self.check()
        if deadline is not None and time.monotonic() >= deadline:
            self.stalled("a plan was not read", f"{self.step_timeout} s (step_timeout_s)")
            self.check()
        self._sleep(seen, deadline)

    def _sleep(self, seen: int, deadline: float | None) -> None:
        """Until the bell rings, or it is time for something."""
        ends = [end for end in (deadline, self._verdict_at) if end is not None]
        self._end.bell.wait(seen, max(0.0, min(ends) - time.monotonic()) if ends else None)

    def _ended(self, rank: int, status: int | None) -> None:
        if rank in self._explained:
            return
        if rank in self._remote and status is not None and status >= 0:  # it ended by itself, and may say why
            self._explained.add(rank)
            self._suspect(WorkerDied(rank, status))
        else:
            self.fail(WorkerDied(rank, status))

    def _suspect(self, error: HeadwayError) -> None:
        """A failure that may be the consequence of one that is still to come in."""
        if self.error is None:
            self._suspects.append(error)
            if self._verdict_at is None:
                self._verdict_at = time.monotonic() + _GRACE_S
                self.ring()

    def _verdict(self) -> HeadwayError:
        """The suspect that says most: which rank has died."""
        error = next((e for e in self._suspects if isinstance(e, WorkerDied)), self._suspects[0])
        return WorkerDied(error.rank, self._dead.get(error.rank)) if isinstance(error, WorkerDied) else error

    def _interrupted(self, error: BaseException) -> None:
        """Half a message would garble all that follow."""
        self.fail(EngineError(f"{type(error).__name__} in the midst of a message to or from the workers"))

    def _deliver(self, rank: int, data: bytes | None) -> None:
        if data is None:
            self._suspect(EngineError(f"rank {rank} cannot be reached"))
            return
        try:
            message = wire.decode_to_engine(data)
        except msgspec.DecodeError as error:
            raise EngineError(f"rank {rank} sent what is no message: {error}") from None
        if isinstance(message, StepResult):
            future = self._steps.pop(message.step, None)
            if future is None:
                raise EngineError(f"rank {rank} sent a result of step {message.step}, which does not run")
            future.set_result(message)
        elif isinstance(message, wire.Ready):
            self.infos[rank] = message.info
        elif isinstance(message, wire.CallResult):
            if message.id in self._calls:
                self._calls[message.id].values[rank] = message.value
        elif message.lost is not None:
            self._explained.add(rank)
            lost = message.lost
            self._suspect(WorkerDied(lost) if lost >= 0 else PeerLost(f"rank {rank}: {message.message}"))
        elif message.id is None:
            self.fail(error_of(rank, message, own=len(self.infos) < self._size))
        elif message.id in self._calls:
            self._calls[message.id].error = error_of(rank, message)
