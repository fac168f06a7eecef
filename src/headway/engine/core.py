"""The engine's loop: plan, submit, wait, update.

depth 0                                           depth 1 (async scheduling)

  host    plan 0 |      wait 0 | update 0 plan 1    host    plan 0 plan 1 |  wait 0 | update 0 plan 2 | wait 1 | ...
  worker         | step 0 .... |                    worker         | step 0 ....... | step 1 ............... | step 2

At depth 1 the worker always has the next plan at hand when a step ends: it samples from its own last tokens, and the
host's bookkeeping for step N runs beside step N + 1. Both depths give the same tokens; at depth 1 a request that stops
at a token costs one more run, whose result is dropped.

A pipeline runs a step on each of its stages, so as many more are in flight, each of other requests.

Structured output: the masks of step N + 1 depend on the tokens of step N, so they follow their plan (Executor.mask)
once update N has told the matchers; the forward pass of N + 1 runs meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one since Python 3.11
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import msgspec

from headway.config import EngineConfig
from headway.engine.constraints import Constraints
from headway.engine.grammar import GrammarBackend, Matcher
from headway.engine.metrics import ENCODE, OUTSIDE, SCHEDULE, UPDATE, EngineMetrics, StepClock
from headway.engine.switching import switch_soon
from headway.engine.trace import Trace
from headway.engine.upkeep import Upkeep
from headway.errors import EngineDead, EngineError
from headway.executor import Executor, WorkerInfo
from headway.messages import EngineOutput, Request, StepPlan, StepResult
from headway.scheduler import EngineStats, Scheduler


@dataclass(slots=True)
class _InFlight:
    step: int
    future: Future[StepResult]
    masked: list[tuple[int, str, Matcher]]


class EngineCore:
    """One engine, driven by one thread. The executor has been started; close() closes it.

    After a failure of the executor every call but close(), stats(), metrics() and has_work() raises EngineDead.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        info: WorkerInfo,
        grammar: GrammarBackend | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.config, self.info = config, info
        self._executor = executor
        self._most_in_flight = config.parallel.pipeline_parallel_size + config.scheduler.depth
        self._constraints = Constraints(grammar, info.vocab_size)
        self._scheduler = Scheduler(config, self._constraints.accept)
        self.upkeep = Upkeep(executor, self._scheduler)
        self._trace = trace
        self._clock = StepClock(trace, config.parallel.reporting_rank)
        self._switch_as_before = switch_soon(self)
        self._in_flight: deque[_InFlight] = deque()
        self._failed: list[EngineOutput] = []  # by their constraint, since the last step()
        self._dead: BaseException | None = None

    def compile(self, request: Request) -> Matcher | None:
        """The matcher that add() wants for a constrained request. May be called from any thread; takes a while."""
        return self._constraints.compile(request)

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Raises RequestError, which costs nobody else anything. matcher: what compile() gave, if it was called."""
        self._check_alive()
        self.upkeep.check()
        if matcher is None:
            matcher = self.compile(request)
        self._scheduler.add(request)
        self._clock.begin()
        if matcher is not None:
            self._constraints.add(request.request_id, matcher)

    def abort(self, request_ids: Iterable[str]) -> list[EngineOutput]:
        """Ends requests now, also with a step in flight; their last outputs, with finish_reason "abort".

        Ids of requests that have ended are ignored.
        """
        self._check_alive()
        outputs = [o for name in request_ids if (o := self._scheduler.abort(name)) is not None]
        self._forget_ended(outputs)
        self._rest_without_work()
        return outputs

    def has_work(self) -> bool:
        """Whether step() has anything to do."""
        return self._dead is None and bool(self._scheduler.has_requests or self._in_flight)

    def step(self) -> list[EngineOutput]:
        """Plans and submits what fits in the pipeline, waits for the oldest step; outputs that ended or stream.

        An error of the executor is raised here once, and means the end of all requests.
        """
        self._check_alive()
        if not self.has_work():
            return []
        with self._deadly(BaseException):
            self._fill()
        with self._deadly(Exception):
            result = self._in_flight[0].future.result()  # Ctrl-C here leaves everything as it was
        with self._deadly(BaseException):
            return self._take(result)

    def check(self) -> None:
        """Raises what is wrong with the executor, if anything is: the engine need not run to lose it."""
        self._check_alive()
        with self._deadly(Exception):
            self._executor.health()

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def metrics(self) -> EngineMetrics:
        """stats() and times, of now; from any thread."""
        return EngineMetrics(**msgspec.structs.asdict(self.stats()), times=self._clock.times())

    def close(self, timeout: float = 5.0) -> None:
        """Idempotent. Steps in flight are let go, their results dropped."""
        with ExitStack() as ends:
            ends.callback(self._executor.close, timeout)
            ends.callback(self._switch_as_before)
            if self._trace is not None:
                ends.callback(self._trace.close)
            ends.callback(self._in_flight.clear)
            if self._dead is None:
                self._dead = EngineDead("the engine was closed")
                with suppress(EngineError, FutureTimeoutError):
                    self._trace_other_ranks()

    def _trace_other_ranks(self) -> None:
        """Their steps, which they have kept; call() of an executor in this process reaches this rank alone."""
        if self._trace is None or self._executor.in_process:
            return
        for rank, steps in enumerate(self._executor.call("recorded_steps", timeout=5.0)):
            if rank != self._clock.rank:
                self._trace.rank_steps(rank, steps)

    def _fill(self) -> None:
        clock = self._clock
        clock.lap(OUTSIDE)
        while len(self._in_flight) < self._most_in_flight:
            plan = self._scheduler.plan()
            clock.lap(SCHEDULE)
            if plan is None:
                break
            self._submit(plan)
            clock.lap(ENCODE)
        assert self._in_flight, "requests wait, but nothing can run"

    def _take(self, result: StepResult) -> list[EngineOutput]:
        self._clock.taken(result)
        self._in_flight.popleft()
        outputs = self._scheduler.update(result)
        self._forget_ended(outputs)
        if self._in_flight:
            self._send_masks(self._in_flight[0])
        if self._failed:
            self._forget_ended(self._failed)
            outputs, self._failed = outputs + self._failed, []
        self._clock.lap(UPDATE)
        self._rest_without_work()
        return outputs

    @contextmanager
    def _deadly(self, kinds: type[BaseException]) -> Generator[None]:
        """Errors of these kinds are the engine's end."""
        try:
            yield
        except kinds as error:
            self._dead = self._first_failure() or error
            if self._dead is error:
                raise
            raise self._dead from None

    def _rest_without_work(self) -> None:
        if not self.has_work():
            self._clock.rest()

    def _first_failure(self) -> BaseException | None:
        """What failed a step in flight: a submit() after it only knows that the executor is dead."""
        futures = [flight.future for flight in self._in_flight]
        return next((error for f in futures if f.done() and (error := f.exception()) is not None), None)

    def _forget_ended(self, outputs: list[EngineOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                self._constraints.forget(output.request_id)

    def _submit(self, plan: StepPlan) -> None:
        masked = self._constraints.hold(plan, [self._scheduler.request_at(slot) for slot in plan.masked_slots])
        flight = _InFlight(plan.step, self._executor.submit(plan), masked)
        self._in_flight.append(flight)
        if len(self._in_flight) == 1:
            self._send_masks(flight)  # every token it depends on is known

    def _send_masks(self, flight: _InFlight) -> None:
        if flight.masked:
            masks, failed = self._constraints.masks(flight.masked)
            self._executor.mask(flight.step, masks)
            for request_id, error in failed.items():
                output = self._scheduler.abort(request_id, error=str(error))
                assert output is not None
                self._failed.append(output)

    def _check_alive(self) -> None:
        if self._dead is not None:
            why = str(self._dead) or type(self._dead).__name__
            raise EngineDead(f"the engine does not run: {why}") from self._dead
