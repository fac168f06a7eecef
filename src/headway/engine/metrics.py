"""Where a step's time goes, on the engine's side and on the worker's, and what that says of the executor."""

from __future__ import annotations

from time import perf_counter_ns

import msgspec

from headway.engine.trace import Trace
from headway.messages import StepResult
from headway.scheduler import EngineStats

# The engine's phases, in a step's order; together they are all the time in which there was work.
OUTSIDE, SCHEDULE, ENCODE, WAIT, COPY_BACK, UPDATE = range(6)
ENGINE_PHASES = ("outside", "schedule", "encode", "wait", "copy_back", "update")
WORKER_PHASES = ("prepare", "model", "sample")


class StepTimes(msgspec.Struct, kw_only=True, frozen=True):
    """Sums of seconds over ``steps`` results.

    On the engine's thread: outside (between two steps: the caller's tokenising, detokenising and waiting), schedule
    (plans), encode (handing them to the executor), wait (for the worker), copy_back (from the end of the worker's step
    to its result being here; 0 where the worker's clock is another machine's), update (results into outputs).

    On the rank that reports: prepare (the batch and its inputs), model (forward pass, logits), sample (tokens, and
    waiting for masks), in_step (from taking a plan up to its result, without waiting for other pipeline stages).
    """

    steps: int = 0
    outside: float = 0.0
    schedule: float = 0.0
    encode: float = 0.0
    wait: float = 0.0
    copy_back: float = 0.0
    update: float = 0.0
    prepare: float = 0.0
    model: float = 0.0
    sample: float = 0.0
    in_step: float = 0.0

    @property
    def working(self) -> float:
        """Wall time, from the first request to the last result, in which the engine had requests."""
        return sum(getattr(self, name) for name in ENGINE_PHASES)

    @property
    def executor_tax(self) -> float:
        """Share of ``working`` in which the rank that reports was in no step: the model could have run and did not.

        Whatever the cause: plans that come late, transport, other pipeline stages, threads that wait for each other, a
        caller that does not come back for the next step. 0 before the first result.
        """
        return max(0.0, 1.0 - self.in_step / self.working) if self.working else 0.0

    def shares(self) -> dict[str, float]:
        """Of ``working``, by phase. The engine's sum to 1; the worker's run beside them."""
        return {name: getattr(self, name) / (self.working or 1.0) for name in (*ENGINE_PHASES, *WORKER_PHASES)}

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})

    def since(self, earlier: StepTimes) -> StepTimes:
        """What came to it after ``earlier``."""
        return StepTimes(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__struct_fields__})


class EngineMetrics(EngineStats, kw_only=True):
    """Counters, and where the time went."""

    times: StepTimes = StepTimes()

    @property
    def executor_tax(self) -> float:
        return self.times.executor_tax

    def __add__(self, other: EngineMetrics) -> EngineMetrics:
        return EngineMetrics(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class StepClock:
    """Adds up where the time goes. Driven by the engine's thread, read by any; all of it costs some 2 us a step.

    The engine calls lap() at the end of each of its phases, taken() with each result, begin() when work comes and
    rest() when none is left.
    """

    def __init__(self, trace: Trace | None = None, rank: int = 0) -> None:
        """rank: whose results come."""
        self._trace, self.rank = trace, rank
        self._resting = True
        self._last = 0
        self._worker_last = 0  # on the worker's clock, where its last step ended or could have begun
        self._steps = 0
        self._engine = [0] * len(ENGINE_PHASES)
        self._worker = dict.fromkeys((*WORKER_PHASES, "in_step"), 0)

    def begin(self) -> None:
        if self._resting:
            self._resting, self._last = False, perf_counter_ns()
            self._worker_last = self._last

    def rest(self) -> None:
        if not self._resting:
            self.lap(OUTSIDE)
            self._resting = True

    def lap(self, phase: int) -> None:
        """The time since the last lap went to ``phase``."""
        self._lap(phase, perf_counter_ns())

    def taken(self, result: StepResult) -> None:
        """A result that was waited for is here."""
        now, times = perf_counter_ns(), result.times_ns
        start, end = times.get("start", now), times.get("end", now)
        if self._last < end < now:
            self._lap(WAIT, end)
            self._lap(COPY_BACK, now)
        else:
            self._lap(COPY_BACK if start < end <= self._last else WAIT, now)
        self._steps += 1
        self._worker["in_step"] += end - start - times.get("wait", 0)
        for name in WORKER_PHASES:
            self._worker[name] += times.get(name, 0)
        if self._trace is not None:
            self._trace.worker_step(self.rank, result.step, min(self._worker_last, start), times, start, end)
        self._worker_last = end

    def times(self) -> StepTimes:
        sums = dict(zip(ENGINE_PHASES, self._engine)) | self._worker
        return StepTimes(steps=self._steps, **{name: total / 1e9 for name, total in sums.items()})

    def _lap(self, phase: int, now: int) -> None:
        self._engine[phase] += now - self._last
        if self._trace is not None:
            self._trace.engine_phase(ENGINE_PHASES[phase], self._last, now)
        self._last = now
