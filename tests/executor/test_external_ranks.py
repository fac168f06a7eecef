"""Two ranks of an external launch in one process: real connections and threads, a worker that does what a test says."""

from __future__ import annotations

import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from headway.config import EngineConfig, ModelConfig, ParallelConfig
from headway.config.machine import Launched, MachineFacts
from headway.errors import ConfigError, EngineDead, EngineError, ModelError, PeerLost, WorkerDied, WorkerError
from headway.executor import WorkerInfo, external
from headway.executor.external import ExternalExecutor
from headway.executor.peers import Peers, Result, Steps
from headway.messages import RankGroup, StepPlan, StepResult

LOAD = 0
Does = dict[tuple[int, int], Callable[[], None]]


class Worker:
    """does: by rank and step, LOAD or more."""

    does: Does

    def __init__(self, config: EngineConfig, rank: int, group: RankGroup | None) -> None:
        self.rank = rank

    def load(self) -> WorkerInfo:
        self.does[self.rank, LOAD]()
        sizes = dict.fromkeys(("num_blocks", "block_size", "vocab_size", "weights_bytes", "kv_bytes"), 1)
        return WorkerInfo(executor="", threads=1, kernels="", program=False, startup_s={}, **sizes)

    def step(self, plan: StepPlan, masks: object) -> StepResult:
        self.does[self.rank, plan.step]()
        return StepResult(step=plan.step)

    def close(self) -> None:
        pass


class Ranks:
    """The second one is the last pipeline stage, which has the results."""

    def __init__(self) -> None:
        self.executors: list[ExternalExecutor] = []
        self.own = threading.local()

    def facts(self) -> MachineFacts:
        launched = Launched(rank=self.own.rank, world_size=2, local_rank=self.own.rank, local_world_size=2)
        return MachineFacts(cores=1, free_memory=1, isas=(), has_cpu_kernels=False, launched=launched)

    def start(self, **parallel: Any) -> list[BaseException | None]:
        """What each raises."""
        config = EngineConfig(
            model=ModelConfig(path="", served_model_name=""),
            parallel=ParallelConfig(executor="external_launcher", pipeline_parallel_size=2, **parallel),
        )
        self.executors = [ExternalExecutor(config) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            return [each.exception() for each in [pool.submit(self._start, rank) for rank in range(2)]]

    def _start(self, rank: int) -> None:
        self.own.rank = rank
        self.executors[rank].start()


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Does:
    does: Does = defaultdict(lambda: lambda: None)
    monkeypatch.setattr(Worker, "does", does, raising=False)
    return does


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, does: Does) -> Generator[Ranks]:
    ranks, ends = Ranks(), socket.socketpair()

    def join(key: str, rank: int, size: int) -> Peers:
        return Peers(rank, size, {1 - rank: ends[rank]})

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(external, "machine_facts", ranks.facts)
    monkeypatch.setattr(external, "join", join)
    monkeypatch.setattr(external, "local_worker", Worker)
    yield ranks
    for executor in ranks.executors:
        executor.close()


def wait(event: threading.Event) -> None:
    assert event.wait(20)


def raises(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


def ill(executor: ExternalExecutor) -> EngineError:
    """What health() says, once it says something."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            executor.health()
        except EngineError as error:
            return error
    raise AssertionError("nothing is wrong")


@pytest.mark.parametrize(
    "error", [ModelError("this is no model"), ConfigError("dtype", "x", "no"), ZeroDivisionError("unlucky")]
)
def test_a_rank_that_cannot_load_raises_the_same_everywhere(ranks: Ranks, does: Does, error: Exception) -> None:
    heard = threading.Event()
    does[0, LOAD], does[1, LOAD] = lambda: wait(heard), raises(error)
    first, second = ranks.start()
    heard.set()
    assert type(first) is type(second) and str(first) == str(second)


@pytest.mark.parametrize(("closer", "step_timeout_s"), [(0, 0.3), (1, 0.3), (1, 0)])
def test_nobody_waits_for_a_rank_that_has_closed(ranks: Ranks, does: Does, closer: int, step_timeout_s: float) -> None:
    stuck = threading.Event()
    does[1, 1] = lambda: wait(stuck)
    assert ranks.start(step_timeout_s=step_timeout_s) == [None, None]
    ranks.executors[closer].close()
    future = ranks.executors[1 - closer].submit(StepPlan(step=1))
    with pytest.raises(EngineDead, match=f"rank {closer} has closed its engine"):
        future.result(8)
    stuck.set()


def test_the_last_result_arrives_though_its_rank_closes(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks.start() == [None, None]
    closed, tell = threading.Event(), Peers.tell

    def tell_late(peers: Peers, news: Steps | Result) -> None:
        closed.wait(0.3)
        tell(peers, news)

    monkeypatch.setattr(Peers, "tell", tell_late)
    futures = [executor.submit(StepPlan(step=1)) for executor in ranks.executors]
    assert futures[1].result(5).step == 1
    ranks.executors[1].close()
    closed.set()
    assert futures[0].result(5).step == 1


@pytest.mark.parametrize("consequence", [WorkerDied(1), PeerLost("another rank is gone")])
def test_the_cause_of_a_lost_peer_is_what_everybody_is_told(ranks: Ranks, does: Does, consequence: EngineError) -> None:
    heard = threading.Event()

    def fail() -> None:
        wait(heard)
        raise ZeroDivisionError("unlucky")

    does[0, 1], does[1, 1] = raises(consequence), fail
    assert ranks.start() == [None, None]
    futures = [executor.submit(StepPlan(step=1)) for executor in ranks.executors]
    assert type(ill(ranks.executors[0])) is type(consequence)
    futures.append(ranks.executors[0].submit(StepPlan(step=2)))  # the engine cannot know yet
    heard.set()
    for future in futures:
        with pytest.raises(WorkerError, match="rank 1: ZeroDivisionError: unlucky"):
            future.result(5)


@pytest.mark.parametrize("consequence", [WorkerDied(1), PeerLost("another rank is gone")])
def test_a_lost_peer_without_a_cause_is_itself_the_error(ranks: Ranks, does: Does, consequence: EngineError) -> None:
    does[0, 1] = raises(consequence)
    assert ranks.start() == [None, None]
    future = ranks.executors[0].submit(StepPlan(step=1))
    with pytest.raises(type(consequence)) as caught:
        future.result(5)
    assert str(caught.value) == str(consequence)
    assert type(ill(ranks.executors[1])) is type(consequence)
