"""Every rank is a process of a launcher (torchrun), and each runs the whole engine on the same requests.

    rank 0   script ── LLM ── scheduler ── Worker(rank 0) ─┐
                                                            ├─ collectives (worker.group)
    rank 1   script ── LLM ── scheduler ── Worker(rank 1) ─┘

Scheduling is deterministic, so equal calls on every rank give equal plans, and nobody has to send any. What could
differ is agreed on at the start (settings, capacity) or checked (a digest of the plans, whenever requests start, and
again where a step takes long): ranks that were called differently get an error, and do not wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import traceback
import uuid
import weakref
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from headway.config import EngineConfig, machine_facts
from headway.config.machine import Launched
from headway.errors import ConfigError, EngineDead, EngineError, WorkerDied, WorkerError
from headway.executor.peers import TICK_S, Failure, Peers, Result, Steps, join, own_address
from headway.executor.uni import Masks, UniExecutor, local_worker
from headway.messages import RankGroup, StepPlan, StepResult, WorkerInfo

_HISTORY = 64  # steps; ranks are at most a pipeline's depth apart

# What ranks may differ in: they agree on the least, or it is nobody else's concern.
_OWN = {"choices", "device", "trace", "model.path", "cache.num_blocks", "model.max_model_len"}


class ExternalExecutor:
    """See ``headway.executor.port.Executor``; call() reaches this rank's worker: the others' callers call too.

    WORLD_SIZE may be a multiple of the ranks: then consecutive ranks make a replica, each with requests of its own.
    """

    in_process = True

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._uni: UniExecutor | None = None
        self._peers: Peers | None = None
        self._memory: int | None = None
        self._error: EngineError | None = None
        self._lock = threading.Lock()
        self._waiting: dict[Future[Any], float] = {}  # since when
        self._digest = 0
        self._digests: dict[int, int] = {}
        self._rank = 0
        # Only the last pipeline stage has the results; its first rank passes them on.
        self._awaited: dict[int, Future[Any]] = {}

    @property
    def _first_of_last_stage(self) -> int:
        parallel = self._config.parallel
        return parallel.ranks - parallel.tensor_parallel_size

    def start(self) -> WorkerInfo:
        """Waits for the other ranks; raises what the first of them raises."""
        launched = machine_facts().launched
        if launched is None:
            raise ConfigError("distributed_executor_backend", "external_launcher", "this process was not launched")
        size = self._config.parallel.ranks
        replica, self._rank = divmod(launched.rank, size)
        try:
            group = self._meet(launched, f"headway/{_attempt()}/{replica}", size) if size > 1 else None
            self._uni = UniExecutor(self._config, partial(local_worker, rank=self._rank, group=group))
            info = self._settled(self._uni.begin()).result()
            if self._peers is not None:
                self._peers.exchange(b"ready")
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
        if self._rank >= self._first_of_last_stage:
            return self._settled(uni.submit(plan))
        result = self._settled()
        self._awaited[plan.step] = result
        uni.submit(plan).add_done_callback(partial(self._fail_if_failed, result))
        return result

    def mask(self, step: int, masks: Masks) -> None:
        uni = self._running()
        if self._rank >= self._first_of_last_stage:
            uni.mask(step, masks)

    def call(self, method: str, *args: Any, timeout: float | None = None) -> list[Any]:
        return self._running().call(method, *args, timeout=timeout)

    def health(self) -> None:
        if self._error is not None:
            raise self._error
        self._running().health()

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
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    # Starting ---------------------------------------------------------------------------------------------------------

    def _meet(self, launched: Launched, key: str, size: int) -> RankGroup:
        one_node = launched.local_world_size == launched.world_size
        peers = join(key, self._rank, size, one_node=one_node)
        self._peers = peers
        peers.listen(_weakly(self._hear), _weakly(self._fail_waiting), _weakly(self._tick))
        weakref.finalize(self, peers.close)  # also at the end of a script that closes nothing
        self._agree(peers)
        self._memory = _share_memory(peers, one_node)
        offer = f"{own_address(one_node)}:{_free_port()} {uuid.uuid4().hex}" if not self._rank else ""
        store, engine = peers.exchange(offer.encode())[0].decode().split()
        return RankGroup(rank=self._rank, size=size, memory=self._memory, store=store, engine=engine)

    def _agree(self, peers: Peers) -> None:
        """Capacity is the least of the ranks'; every other setting must be the same."""
        config = self._config
        mine = {"settings": _flat(asdict(config)), "capacity": [config.cache.num_blocks, config.model.max_model_len]}
        offers = [msgspec.json.decode(data) for data in peers.exchange(msgspec.json.encode(mine))]
        settings = msgspec.json.decode(msgspec.json.encode(mine["settings"]))
        for rank, offer in enumerate(offers):
            for name, value in offer["settings"].items():
                if settings.get(name) != value:
                    accepted = f"rank {rank} has {value!r}; every rank must be given the same"
                    raise ConfigError(name.rpartition(".")[2], settings.get(name), accepted)
        num_blocks, max_model_len = (min(column) for column in zip(*(o["capacity"] for o in offers), strict=True))
        self._config = replace(
            config,
            cache=replace(config.cache, num_blocks=num_blocks),
            model=replace(config.model, max_model_len=max_model_len),
        )

    # Steps ------------------------------------------------------------------------------------------------------------

    def _running(self) -> UniExecutor:
        if self._error is not None:
            raise EngineDead(f"another rank failed before: {self._error}") from self._error
        if self._uni is None:
            raise EngineDead("the executor is not running")
        return self._uni

    def _check_starts(self, step: int) -> None:
        """Requests start: where callers differ, it shows here, before a step on which the ranks would not meet."""
        assert self._peers is not None
        mine = b"%d %d" % (step, self._digest)
        waiting: Future[Any] = Future()
        self._waiting[waiting] = time.monotonic()
        try:
            digests = self._peers.exchange(mine)
        finally:
            self._waiting.pop(waiting, None)
        for rank, digest in enumerate(digests):
            if digest != mine:
                raise self._diverged(rank, step)

    def _diverged(self, rank: int, step: int) -> EngineError:
        accepted = "every rank must make the same calls with the same arguments"
        return EngineError(f"ranks {self._rank} and {rank} run different requests at step {step}: {accepted}")

    def _settled(self, inner: Future[Any] | None = None) -> Future[Any]:
        """A future that ``inner`` settles, or the failure of another rank."""
        if self._peers is None and inner is not None:
            return inner
        outer: Future[Any] = Future()
        with self._lock:
            if self._error is not None:
                raise self._error
            self._waiting[outer] = time.monotonic()
        if inner is not None:
            inner.add_done_callback(partial(self._settle, outer))
        return outer

    def _settle(self, outer: Future[Any], inner: Future[Any]) -> None:
        if self._fail_if_failed(outer, inner):
            return
        result = inner.result()
        if self._peers is not None and self._first_of_last_stage == self._rank > 0 and isinstance(result, StepResult):
            self._peers.tell(Result(result.step, msgspec.msgpack.encode(result)))
        if self._takes(outer):
            outer.set_result(result)

    def _fail_if_failed(self, outer: Future[Any], inner: Future[Any]) -> bool:
        error = inner.exception()
        if error is not None and self._takes(outer):
            outer.set_exception(self._own(error))
            self._tell(error)
        return error is not None

    def _takes(self, future: Future[Any]) -> bool:
        """Whether it is still waited for; true once."""
        with self._lock:
            return self._waiting.pop(future, None) is not None

    def _own(self, error: BaseException) -> BaseException:
        """UniExecutor knows no rank but 0."""
        if isinstance(error, WorkerError):
            return WorkerError(self._rank, error.kind, error.message, error.remote_traceback)
        return error

    def _tell(self, error: BaseException) -> None:
        """Tells the other ranks why this one cannot go on."""
        if self._peers is None or self._error is not None or isinstance(error, EngineDead):
            return
        failure = Failure(self._rank, type(error).__name__, str(error), "".join(traceback.format_exception(error)))
        if isinstance(error, WorkerDied):
            failure = Failure(error.rank, None)
        elif isinstance(error, WorkerError):
            failure = Failure(self._rank, error.kind, error.message, error.remote_traceback)
        self._peers.fail(failure)

    # The peers' thread ------------------------------------------------------------------------------------------------

    def _fail_waiting(self, error: EngineError) -> None:
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
                assert self._peers is not None
                self._peers.fail(Failure(self._rank, "Diverged", str(self._diverged(other.rank, step))))
                return

    def _tick(self) -> None:
        oldest = min(list(self._waiting.values()), default=None)
        if oldest is None or time.monotonic() - oldest < TICK_S or self._peers is None:
            return
        if self._peers.gone:
            self._fail_waiting(EngineDead(f"rank {min(self._peers.gone)} has closed its engine"))
        else:
            self._peers.tell(Steps(self._rank, dict(self._digests)))


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


def _share_memory(peers: Peers, one_node: bool) -> int | None:
    """A descriptor of memory that all ranks share; None where they cannot."""
    memory = os.memfd_create("headway") if one_node and not peers.rank else None
    (offer, *_) = peers.exchange(b"" if memory is None else f"/proc/{os.getpid()}/fd/{memory}".encode())
    if offer and peers.rank:
        with contextlib.suppress(OSError):  # ranks that do not see each other's processes (containers)
            memory = os.open(Path(offer.decode()), os.O_RDWR | os.O_CLOEXEC)
    everyone = all(peers.exchange(b"" if memory is None else b"shared"))
    if memory is not None and not everyone:
        os.close(memory)
        return None
    return memory


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
