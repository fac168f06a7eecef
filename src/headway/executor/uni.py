"""The model in this process, on a thread of its own: torch and the kernels release the GIL, so the engine overlaps.

    engine thread ── jobs ──> headway-worker thread (owns the Worker) ── futures ──> engine thread
                  ── masks ─>      (only steps with masked slots wait for them)

The thread refers to its mailbox, never to the executor, so an executor that is dropped without close() ends it too.
"""

from __future__ import annotations

import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from headway.config import EngineConfig
from headway.errors import EngineDead, EngineError, HeadwayError, WorkerError
from headway.executor.port import WorkerInfo
from headway.messages import RankGroup, StepPlan, StepResult

Masks = dict[int, bytes]


class UniWorker(Protocol):
    """What the thread needs of a worker."""

    def load(self) -> WorkerInfo: ...

    def step(self, plan: StepPlan, masks: Callable[[int], Masks]) -> StepResult:
        """masks(step) blocks until the masks of that step arrive."""
        ...

    def close(self) -> None: ...


class _Closed(BaseException):
    """Unwinds a step that waits for masks when the executor closes."""


class _Mailbox:
    """What both sides share. ``error``: what ended the worker; set once, by its thread; ended: set as its last deed.

    The latter is waited for because Thread.join, once interrupted, takes the thread for ended (Python before 3.13).
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.jobs: SimpleQueue[tuple[Future[Any], str, tuple[Any, ...]] | None] = SimpleQueue()
        self.masks: SimpleQueue[tuple[int, Masks] | None] = SimpleQueue()
        self.error: EngineError | None = None
        self.closing = False
        self.ended = threading.Event()

    def wait_masks(self, step: int) -> Masks:
        item = self.masks.get()
        if item is None:
            raise _Closed
        assert item[0] == step, f"masks of step {item[0]} for step {step}"
        return item[1]


def local_worker(config: EngineConfig, rank: int = 0, group: RankGroup | None = None) -> UniWorker:
    from headway.worker import Worker

    return Worker(config, rank, group)


class UniExecutor:
    """See ``headway.executor.port.Executor``. make_worker runs on the worker's thread."""

    in_process = True

    def __init__(
        self, config: EngineConfig, make_worker: Callable[[EngineConfig], UniWorker] = local_worker, rank: int = 0
    ) -> None:
        """rank: which one errors name."""
        self._config = config
        self._make_worker = make_worker
        self._box = _Mailbox(rank)
        self._thread: threading.Thread | None = None
        self._finalizer: weakref.finalize[[_Mailbox, threading.Thread, float], UniExecutor] | None = None

    def start(self) -> WorkerInfo:
        """Errors of headway's own propagate as they are, others as WorkerError."""
        try:
            return self.begin().result()
        except BaseException:
            with suppress(EngineError):  # Ctrl-C while the worker loads: its thread ends after that
                self.close()
            raise

    def begin(self) -> Future[WorkerInfo]:
        """The first half of start(): the worker loads."""
        assert self._thread is None, "start() runs once"
        if self._box.closing:
            raise EngineDead("the executor was closed")
        started: Future[WorkerInfo] = Future()
        args = (self._config, self._make_worker, self._box, started)
        self._thread = threading.Thread(target=_run, args=args, name="headway-worker", daemon=True)
        self._thread.start()
        # Also runs at interpreter exit, so that no daemon thread is inside a kernel while modules go away.
        self._finalizer = weakref.finalize(self, _shut_down, self._box, self._thread, 5.0)
        return started

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        return self._put("step", (plan, self._box.wait_masks))

    def mask(self, step: int, masks: Masks) -> None:
        self._box.masks.put((step, masks))

    def call(self, method: str, *args: Any, timeout: float | None = None) -> list[Any]:
        return [self._put(method, args).result(timeout)]

    def health(self) -> None:
        if self._box.error is not None:
            raise self._box.error
        if self._box.closing or self._thread is None:
            raise EngineDead("the executor is not running")

    def close(self, timeout: float = 5.0) -> None:
        self._box.closing = True
        if self._finalizer is None or self._thread is None:
            return
        _shut_down(self._box, self._thread, timeout)
        if not self._box.ended.is_set():
            raise EngineError(f"the worker's thread did not end within {timeout} s; it ends after its step")
        # Not before: what interrupts the wait leaves the rest of it to the interpreter's exit.
        self._finalizer.detach()

    def _put(self, method: str, args: tuple[Any, ...]) -> Future[Any]:
        if self._box.error is not None:
            raise EngineDead(f"the worker failed before: {self._box.error}") from self._box.error
        if self._box.closing or self._thread is None:
            raise EngineDead("the executor is not running")
        future: Future[Any] = Future()
        self._box.jobs.put((future, method, args))
        return future


def _shut_down(box: _Mailbox, thread: threading.Thread, timeout: float) -> None:
    box.closing = True
    box.jobs.put(None)
    box.masks.put(None)
    # Garbage collection may run this anywhere, on that thread too.
    if thread is not threading.current_thread() and box.ended.wait(timeout):
        thread.join(timeout)


def _run(
    config: EngineConfig,
    make_worker: Callable[[EngineConfig], UniWorker],
    box: _Mailbox,
    started: Future[WorkerInfo],
) -> None:
    try:
        _serve(config, make_worker, box, started)
    finally:
        box.ended.set()


def _serve(
    config: EngineConfig,
    make_worker: Callable[[EngineConfig], UniWorker],
    box: _Mailbox,
    started: Future[WorkerInfo],
) -> None:
    """The thread: loads, answers jobs until it is told to end, closes the worker."""
    try:
        worker = make_worker(config)
    except BaseException as error:
        started.set_exception(_portable(error, box.rank))
        return
    try:
        try:
            info = worker.load()
        except BaseException as error:
            started.set_exception(_portable(error, box.rank))
            return
        started.set_result(info)
        del started
        while (job := box.jobs.get()) is not None:
            _answer(worker, box, *job)
            del job
    finally:
        worker.close()
        _refuse_rest(box)


def _answer(worker: UniWorker, box: _Mailbox, future: Future[Any], method: str, args: tuple[Any, ...]) -> None:
    if box.error is not None:
        future.set_exception(box.error)
        return
    if box.closing:
        future.set_exception(EngineDead("the executor was closed"))
        return
    try:
        result = getattr(worker, method)(*args)
    except _Closed:
        future.set_exception(EngineDead("the executor was closed"))
    except BaseException as error:
        if method == "step":
            box.error = _engine_error(error, box.rank)
        future.set_exception(box.error or _portable(error, box.rank))
    else:
        future.set_result(result)


def _refuse_rest(box: _Mailbox) -> None:
    """Jobs that came in while the worker closed."""
    while True:
        try:
            job = box.jobs.get_nowait()
        except Empty:
            return
        if job is not None:
            job[0].set_exception(EngineDead("the executor was closed"))


def _portable(error: BaseException, rank: int) -> BaseException:
    """Without its traceback, whose frames would keep the model alive."""
    return error.with_traceback(None) if isinstance(error, HeadwayError) else _worker_error(error, rank)


def _engine_error(error: BaseException, rank: int) -> EngineError:
    """Of a step: that of another rank, which died, or of this one."""
    return error.with_traceback(None) if isinstance(error, EngineError) else _worker_error(error, rank)


def _worker_error(error: BaseException, rank: int) -> WorkerError:
    return WorkerError(rank, type(error).__name__, str(error), traceback.format_exc())
