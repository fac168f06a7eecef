"""Workers with a model that fail, once a signal has told them to, in the step that runs or the next one."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable
from typing import Any

from headway.config import EngineConfig
from headway.executor.channel.shared import WorkerEnd
from headway.executor.mp import MpExecutor
from headway.messages import StepPlan, StepResult


class FailingExecutor(MpExecutor):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, "failing:failing_worker")


def failing_worker(*args: Any) -> object:
    from headway.worker import Worker

    class FailingWorker(Worker):
        fail: Callable[[], None] | None = None

        def step(self, plan: StepPlan, masks: Callable[[int], dict[int, bytes]]) -> StepResult:
            result = super().step(plan, masks)
            if self.fail is not None:
                self.fail()
            return result

    worker = FailingWorker(*args)

    def on(number: signal.Signals, fail: Callable[[], None]) -> None:
        signal.signal(number, lambda number, frame: setattr(worker, "fail", fail))

    on(signal.SIGUSR1, _raise)
    on(signal.SIGUSR2, _garble_ring)
    on(signal.SIGWINCH, lambda: time.sleep(0.2))
    return worker


def _raise() -> None:
    raise ZeroDivisionError("unlucky")


def _garble_ring() -> None:
    (link,) = (thing for thing in gc.get_objects() if isinstance(thing, WorkerEnd))
    link._results._counts[0] = 1 << 40  # pyright: ignore[reportPrivateUsage]
    link._engine_bell.ring()  # pyright: ignore[reportPrivateUsage]
    time.sleep(60)
