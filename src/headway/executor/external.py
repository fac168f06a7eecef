"""Every rank is a process of a launcher (torchrun), and each runs the whole engine on the same requests.

    rank 0   script ── LLM ── scheduler ── Worker(rank 0) ─┐
                                                            ├─ collectives (worker.group)
    rank 1   script ── LLM ── scheduler ── Worker(rank 1) ─┘

Scheduling is deterministic, so equal calls on every rank give equal plans, and nobody has to send any. What could
differ is agreed on at the start (settings, capacity) or checked (a digest of the plans, whenever requests start, and
again where a step takes long): ranks that were called differently get an error, and nobody waits longer for the others
than the timeouts allow.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from typing import Any, NamedTuple

import msgspec

from headway.config import EngineConfig, machine_facts
from headway.errors import ConfigError, EngineDead, EngineError, HeadwayError, PeerLost, WorkerDied
from headway.executor.failure import failure_of
from headway.executor.peers import Failure, Peers, Result, Steps, join, own_address
from headway.executor.uni import Masks, UniExecutor, local_worker
from headway.messages import RankGroup, StepPlan, StepResult, WorkerInfo

_HISTORY = 64  # steps; ranks are at most a pipeline's depth apart

_GRACE_S = 1.0  # for the cause of a lost peer to come

_LONG_S = 2.0  # a wait in which something may be wrong

# What ranks may differ in: they agree on the least, or it is nobody else's concern.
_OWN = {
    "choices",
    "device.threads",
    "device.isa",
    "ray",
    "trace",
    "model.path",
    "cache.num_blocks",
    "model.max_model_len",
}
_SETTINGS = {
    "parallel.executor": "distributed_executor_backend",
    "scheduler.depth": "async_scheduling",
    "scheduler.policy": "scheduling_policy",
}


class _Wait(NamedTuple):
    """For other ranks, or for a step: ``limit`` seconds at most, 0: any time; ``error`` is the end of it."""

    since: float
    limit: float
    error: EngineError


class ExternalExecutor:
    """See ``headway.executor.port.Executor``; call() reaches this rank's worker: the others' callers call too.

    WORLD_SIZE may be a multiple of the ranks: then consecutive ranks make a replica, each with requests of its own.
    """

    in_process = True

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._uni: UniExecutor | None = None
        self._peers: Peers | None = None
        self._error: HeadwayError | None = None
        self._lock = threading.Lock()
        self._waiting: dict[Future[Any], _Wait] = {}
        self._told: Steps | None = None
        self._digest = 0
        self._digests: dict[int, int] = {}
        self._rank = 0
        # Only the last pipeline stage has the results; its first rank passes them on.
        self._awaited: dict[int, Future[Any]] = {}

    def start(self) -> WorkerInfo:
        """Waits for the other ranks; raises what the first of them raises."""
        launched = machine_facts().launched
        if launched is None:
            raise ConfigError("distributed_executor_backend", "external_launcher", "this process was not launched")
        parallel = self._config.parallel
        replica, self._rank = divmod(launched.rank, parallel.ranks)
        try:
            group = self._meet(f"headway/{_attempt()}/{replica}") if parallel.ranks > 1 else None
            make_worker = partial(local_worker, rank=self._rank, group=group)
            self._uni = UniExecutor(self._config, make_worker, self._rank)
            limit = parallel.start_timeout_s
            late = f"the model was not loaded within {limit:g} s (start_timeout_s)"
            info = self._settled(self._uni.begin(), limit, late).result()
            self._start_together(b"ready")
        except BaseException as error:
            self._tell(error)
            with contextlib.suppress(EngineError):
                self.close()
            raise
        return msgspec.structs.replace(info, max_model_len=self._config.model.max_model_len)

    def submit(self, plan: StepPlan) -> Future[StepResult]:
        uni = self._running()
        if self._peers is not None:
            self._digest = zlib.crc32(msgspec.msgpack.encode(plan), self._digest)
            self._digests[plan.step] = self._digest
            self._digests.pop(plan.step - _HISTORY, None)
            if plan.starts:
                self._check_starts(plan.step)
        limit = self._config.parallel.step_timeout_s
        late = limit, f"no result of step {plan.step} within {limit:g} s (step_timeout_s)"
        if self._rank >= self._config.parallel.reporting_rank:
            return self._settled(self._begun(uni, plan), *late)
        result = self._settled(None, *late)
        self._awaited[plan.step] = result
        if (inner := self._begun(uni, plan)) is not None:
            inner.add_done_callback(partial(self._fail_if_failed, result))
        return result

    def mask(self, step: int, masks: Masks) -> None:
        uni = self._running()
        if self._rank >= self._config.parallel.reporting_rank:
            uni.mask(step, masks)

    def call(self, method: str, *args: Any, timeout: float | None = None) -> list[Any]:
        return self._running().call(method, *args, timeout=timeout)

    def health(self) -> None:
        if self._error is not None:
            raise self._error
        self._started().health()

    def close(self, timeout: float = 5.0) -> None:
        if self._peers is not None:
            self._peers.close()
        try:
            # A worker that waits for a lost rank may never end; its thread dies with the process.
            if self._uni is not None:
                self._uni.close(timeout if self._error is None else 0.1)
        except EngineError:
            if self._error is None:
                raise

    # Starting ---------------------------------------------------------------------------------------------------------

    def _meet(self, key: str) -> RankGroup:
        size = self._config.parallel.ranks
        peers = self._peers = join(key, self._rank, size)
        peers.listen(_weakly(self._hear), _weakly(self._fail_waiting), _weakly(self._tick))
        weakref.finalize(self, peers.close)  # also at the end of a script that closes nothing
        self._agree()
        offer = f"{own_address()}:{_free_port()} {secrets.token_hex(8)}" if not self._rank else ""
        store, engine = self._start_together(offer.encode())[0].decode().split()
        return RankGroup(rank=self._rank, size=size, store=store, engine=engine)

    def _agree(self) -> None:
        """Capacity is the least of the ranks'; every other setting must be the same."""
        config = self._config
        mine = {"settings": _flat(asdict(config)), "capacity": [config.cache.num_blocks, config.model.max_model_len]}
        offers = [msgspec.json.decode(data) for data in self._start_together(msgspec.json.encode(mine))]
        settings = msgspec.json.decode(msgspec.json.encode(mine["settings"]))
        for rank, offer in enumerate(offers):
            for name, value in offer["settings"].items():
                if settings.get(name) != value:
                    accepted = f"rank {rank} has {value!r}; every rank must be given the same"
                    setting = _SETTINGS.get(name) or name.rpartition(".")[2]
                    raise ConfigError(setting, settings.get(name), accepted)
        num_blocks, max_model_len = (min(column) for column in zip(*(o["capacity"] for o in offers), strict=True))
        self._config = replace(
            config,
            cache=replace(config.cache, num_blocks=num_blocks),
            model=replace(config.model, max_model_len=max_model_len),
        )

    def _start_together(self, data: bytes) -> list[bytes]:
        limit = self._config.parallel.start_timeout_s
        return self._exchange(data, limit, f"the other ranks have not started within {limit:g} s (start_timeout_s)")

    # Steps ------------------------------------------------------------------------------------------------------------

    def _running(self) -> UniExecutor:
        if self._error is not None:
            raise EngineDead(f"another rank failed before: {self._error}") from self._error
        return self._started()

    def _started(self) -> UniExecutor:
        if self._uni is None:
            raise EngineDead("the executor is not running")
        return self._uni

    def _begun(self, uni: UniExecutor, plan: StepPlan) -> Future[StepResult] | None:
        """None after a step that has failed: its cause, which may be still to come, is this one's end too."""
        try:
            return uni.submit(plan)
        except EngineDead as dead:
            if self._peers is None or dead.__cause__ is None:
                raise
            return None

    def _check_starts(self, step: int) -> None:
        """Requests start: where callers differ, it shows here, before a step on which the ranks would not meet."""
        mine = b"%d %d" % (step, self._digest)
        limit = self._config.parallel.step_timeout_s
        late = f"the other ranks have not made this call within {limit:g} s (step_timeout_s)"
        digests = self._exchange(mine, limit, late)
        for rank, digest in enumerate(digests):
            if digest != mine:
                raise self._diverged(rank, step)

    def _diverged(self, rank: int, step: int) -> EngineError:
        accepted = "every rank must make the same calls with the same arguments"
        return EngineError(f"ranks {self._rank} and {rank} run different requests at step {step}: {accepted}")

    def _exchange(self, data: bytes, limit: float, late: str) -> list[bytes]:
        """See Peers.exchange; the error is ``late`` when the others do not come."""
        if self._peers is None:
            return [data]
        waiting: Future[Any] = Future()
        with self._lock:
            self._waiting[waiting] = self._wait(limit, late)
        try:
            return self._peers.exchange(data)
        finally:
            self._takes(waiting)

    def _settled(self, inner: Future[Any] | None, limit: float, late: str) -> Future[Any]:
        """A future that ``inner`` settles, or the failure of another rank, or ``late``."""
        if self._peers is None and inner is not None:
            return inner
        outer: Future[Any] = Future()
        with self._lock:
            if self._error is not None:
                raise self._error
            self._waiting[outer] = self._wait(limit, late)
        if inner is not None:
            inner.add_done_callback(partial(self._settle, outer))
        return outer

    def _wait(self, limit: float, late: str) -> _Wait:
        return _Wait(time.monotonic(), limit, EngineError(f"rank {self._rank}: {late}"))

    def _settle(self, outer: Future[Any], inner: Future[Any]) -> None:
        # Taken before others hear the result, who may fail at what comes next; told before the caller has it, who may
        # close the engine.
        if self._fail_if_failed(outer, inner) or not self._takes(outer):
            return
        result = inner.result()
        if (
            self._peers is not None
            and self._config.parallel.reporting_rank == self._rank > 0
            and isinstance(result, StepResult)
        ):
            self._peers.tell(Result(result.step, msgspec.msgpack.encode(result)))
        outer.set_result(result)

    def _fail_if_failed(self, outer: Future[Any], inner: Future[Any]) -> bool:
        error = inner.exception()
        if isinstance(error, (PeerLost, WorkerDied)):  # also of a rank that lives, but whose worker has ended
            with self._lock:
                if outer in self._waiting:
                    self._waiting[outer] = _Wait(time.monotonic(), _GRACE_S, error)
        elif error is not None and self._takes(outer):
            self._tell(error)  # first: who hears of the error finds that the engine has ended
            outer.set_exception(error)
        return error is not None

    def _takes(self, future: Future[Any]) -> bool:
        """Whether it is still waited for; true once."""
        with self._lock:
            return self._waiting.pop(future, None) is not None

    def _tell(self, error: BaseException) -> None:
        """Tells the other ranks why this one cannot go on."""
        if self._peers is None or self._error is not None or isinstance(error, EngineDead):
            return
        died = isinstance(error, WorkerDied)
        self._peers.fail(Failure(error.rank, None) if died else Failure(self._rank, failure_of(error)))

    # The peers' thread ------------------------------------------------------------------------------------------------

    def _fail_waiting(self, error: HeadwayError) -> None:
        """Another rank cannot go on."""
        with self._lock:
            self._error = error
            waiting, self._waiting = list(self._waiting), {}
        for future in waiting:
            future.set_exception(error)

    def _hear(self, news: Steps | Result) -> None:
        if isinstance(news, Steps):
            self._compare(news)
        elif (future := self._awaited.pop(news.step, None)) is not None:
            result = msgspec.msgpack.decode(news.data, type=StepResult)
            if self._takes(future):
                future.set_result(result)

    def _compare(self, other: Steps) -> None:
        """Another rank waits long, and tells what it runs."""
        for step, digest in other.digests.items():
            if self._digests.get(step, digest) != digest:
                self._tell(self._diverged(other.rank, step))
                return

    def _tick(self) -> None:
        with self._lock:
            waits = list(self._waiting.values())
        if self._peers is None or not waits:
            return
        now, gone = time.monotonic(), self._peers.gone
        over = [wait.error for wait in waits if 0 < wait.limit <= now - wait.since]
        is_long = now - min(wait.since for wait in waits) >= _LONG_S
        # Who has closed has finished its calls, and what it took part in ends here, too, soon or never.
        if gone and (over or (is_long and now - min(gone.values()) >= _LONG_S)):
            self._fail_waiting(EngineDead(f"rank {min(gone)} has closed its engine"))
        elif over:
            self._tell(over[0])
        elif is_long and self._told != (news := Steps(self._rank, dict(self._digests))):
            self._told = news
            self._peers.tell(news)


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """For the peers' thread: an executor that is dropped without close() ends it too."""
    reference = weakref.WeakMethod(method)

    def call(*args: object) -> None:
        if (alive := reference()) is not None:
            alive(*args)

    return call


def _attempt() -> str:
    """torchrun's store outlives a restart of the ranks."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix + key
        if name not in _OWN:
            flat |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
