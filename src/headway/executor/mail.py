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

from headway import errors
from headway.errors import EngineDead, EngineError, FieldError, HeadwayError, WorkerDied, WorkerError
from headway.executor.channel import wire
from headway.executor.channel.shared import EngineEnd
from headway.messages import StepPlan, StepResult, WorkerInfo

if TYPE_CHECKING:
    from headway.executor.channel.tcp import Hub


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
            self._mail.stalled(f"no result of step {self._step}")


class _Reply:
    """The answers to one call."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.values: dict[int, Any] = {}
        self.error: BaseException | None = None

    def done(self) -> bool:
        return self.error is not None or len(self.values) == self._size


class Mail:
    """One engine's correspondence with its ``size`` workers, used by any thread. After ``fail`` it is over."""

    def __init__(self, size: int, end: EngineEnd, step_timeout: float | None, reporter: int) -> None:
        """step_timeout: seconds after which a step, and the engine, is given up. reporter: the rank of the results."""
        self.step_timeout = step_timeout
        self.infos: dict[int, WorkerInfo] = {}
        self.error: HeadwayError | None = None
        self._size, self._end, self._reporter = size, end, reporter
        self._hub: Hub | None = None
        self._remote: list[int] = []
        self._steps: dict[int, StepFuture] = {}
        self._calls: dict[int, _Reply] = {}
        self._ids = itertools.count()
        self._dead: dict[int, int | None] = {}
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
        """Every rank's answer in order. Raises what one raised, at once, and TimeoutError."""
        reply, number = _Reply(self._size), next(self._ids)
        with self._lock:
            self._calls[number] = reply
            self._send(wire.Call(number, method, list(args)))
        try:
            if not self.wait(reply.done, timeout):
                raise FutureTimeoutError(f"{method} took more than {timeout} s")
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
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            self._end.bell.wait(seen, left)

    def take(self) -> None:
        """Delivers what has come in. What cannot be understood, and a dead worker, are failures."""
        with self._lock:
            dead = dict(self._dead)  # first: what a worker wrote before its end explains it
            try:
                messages = self._end.receive()
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
                self.fail(WorkerDied(rank, status))

    def stalled(self, what: str) -> None:
        """Ends it all: the time limit for a step is over."""
        with self._lock:
            ranks = self._end.behind() or [self._reporter]
            names = "rank " + ", ".join(map(str, ranks))
            self.fail(EngineError(f"{names}: {what} within {self.step_timeout} s (step_timeout_s)"))

    def fail(self, error: HeadwayError) -> None:
        """The first failure is what everybody who waits is told."""
        with self._lock:
            if self.error is not None:
                return
            self.error = error
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
        self.check()
        if self._closing:
            raise EngineDead("the executor was closed")
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            self.stalled("a plan was not read")
            self.check()
        self._end.bell.wait(seen, left)

    def _interrupted(self, error: BaseException) -> None:
        """Half a message would garble all that follow."""
        self.fail(EngineError(f"{type(error).__name__} in the midst of a message to or from the workers"))

    def _deliver(self, rank: int, data: bytes) -> None:
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
        elif message.id is None:
            self.fail(_error(rank, message, own=len(self.infos) < self._size))
        elif message.id in self._calls:
            self._calls[message.id].error = _error(rank, message, own=True)


def _error(rank: int, failure: wire.Failure, own: bool) -> HeadwayError:
    """The exception as the caller gets it. own: one of headway's is itself again (what is wrong with a model)."""
    kind = getattr(errors, failure.kind, None) if own else None
    if failure.field is not None and kind in (errors.ConfigError, errors.RequestError):
        return kind(*failure.field)
    more_than_text = (FieldError, WorkerError, WorkerDied)
    if isinstance(kind, type) and issubclass(kind, HeadwayError) and not issubclass(kind, more_than_text):
        return kind(failure.message)
    return WorkerError(rank, failure.kind, failure.message, failure.remote_traceback)
