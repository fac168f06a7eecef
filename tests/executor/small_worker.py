"""A worker without a model, for processes that start at once.

A plan's ``releases`` say what its step does, on which rank, and how long or how large.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from headway.config import EngineConfig
from headway.errors import ModelError
from headway.executor.channel.shared import WorkerEnd
from headway.messages import RankGroup, StepPlan, StepResult, WorkerInfo

NOTHING, RAISE, DIE, STOP, SLEEP, BIG, GARBAGE, UNASKED = range(8)


class SmallWorker:
    def __init__(self, config: EngineConfig, rank: int, group: RankGroup | None) -> None:
        self.config, self.rank, self.group = config, rank, group

    def load(self) -> WorkerInfo:
        """The model's path says what goes wrong, and on which rank."""
        wanted, _, rank = self.config.model.path.partition("@")
        if rank == str(self.rank):
            if wanted == "bad":
                raise ModelError("this is no model")
            if wanted == "broken":
                raise ZeroDivisionError("unlucky")
            if wanted == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if wanted == "hangs":
                signal.pause()
        return WorkerInfo(
            executor="mp",
            num_blocks=10 - self.rank,
            block_size=16,
            vocab_size=0,
            threads=1,
            kernels="none",
            program=False,
            weights_bytes=7,
            kv_bytes=5,
            startup_s={"load": float(self.rank)},
            pids=[os.getpid()],
        )

    def step(self, plan: StepPlan, masks: Callable[[int], dict[int, bytes]]) -> StepResult:
        result = StepResult(step=plan.step, tokens=plan.runs or b"")
        if plan.masked_slots:
            result.tokens = masks(plan.step)[0]
        what, rank, amount = (*plan.releases, 0, 0, 0)[:3]
        if rank != self.rank:
            return result
        if what == RAISE:
            raise ZeroDivisionError("unlucky")
        if what in (DIE, STOP):
            os.kill(os.getpid(), signal.SIGKILL if what == DIE else signal.SIGSTOP)
        elif what == SLEEP:
            time.sleep(amount / 1000)
        elif what == BIG:
            result.tokens = bytes(amount)
        elif what == GARBAGE:
            (link,) = (thing for thing in gc.get_objects() if isinstance(thing, WorkerEnd))
            link.send(b"\xc1" * 20)
        elif what == UNASKED:
            result.step += 100
        return result

    def close(self) -> None:
        pass

    def echo(self, *args: Any) -> list[Any]:
        return [self.rank, *args]

    def fail(self, rank: int) -> None:
        if rank == self.rank:
            raise KeyError("no such thing")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def loaded(self, module: str) -> bool:
        return module in sys.modules
