"""Runs jobs in processes that are killed: one for each line of JSON on stdin, whose exit status it prints.

crash_at: SIGKILL at so many calls that change what is on disk, before the call or after it. kill_after_s: from outside.
file_size: no file may be larger, as on a disk that is full.
A row is answered once its file of computed rows has its id, out of order; every seventh fails, unless mended.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headway.batch.arrow  # noqa: F401  here, and not in every child
from headway.batch.flow import Fail, Flow
from headway.batch.job import Job, JobOptions, run
from headway.batch.row import Done, Row

CALLS = ("fsync", "replace", "ftruncate", "unlink", "pwrite")


def failing(index: int) -> bool:
    return index % 7 == 3


class Shuffled:
    """Answers rows in a random order, some of them long after others."""

    name = "shuffled"

    def __init__(self, seed: int, window: int, mended: bool, computed: Path) -> None:
        self.window, self._mended = window, mended
        self._random = random.Random(seed)
        self._inside: list[Row] = []
        self._computed = os.open(computed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def open(self, fail: Fail) -> None:
        pass

    def submit(self, rows: list[Row], done: Done) -> None:
        self._inside += rows
        asyncio.get_running_loop().call_soon(self._answer, done)

    def _answer(self, done: Done) -> None:
        self._random.shuffle(self._inside)
        count = self._random.randint(0, len(self._inside))
        answered, self._inside = self._inside[:count], self._inside[count:]
        for row in answered:
            if failing(row.source["id"]) and not self._mended:
                row.fail(ValueError("the seventh"), self.name)
            row.data.update(answer=f"to {row.data['text']}")
            row.output_tokens = 2
        os.write(self._computed, "".join(f"{row.source['id']}\n" for row in answered).encode())
        if answered:
            done(answered)
        if self._inside:
            asyncio.get_running_loop().call_soon(self._answer, done)

    async def close(self) -> None:
        os.close(self._computed)


def crash_at(calls: int, after: bool) -> None:
    left = calls

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return run

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def work(spec: dict[str, Any]) -> None:
    if "crash_at" in spec:
        crash_at(spec["crash_at"], spec.get("after", False))
    if "file_size" in spec:
        resource.setrlimit(resource.RLIMIT_FSIZE, (spec["file_size"],) * 2)
    stage = Shuffled(spec["seed"], spec.get("window", 8), spec.get("mended", False), Path(spec["computed"]))
    options = JobOptions(progress=False, flush_interval_s=spec.get("flush_interval_s", 0.0), **spec["options"])
    run(Job(spec["source"], spec["target"], options, {"model": "m"}, spec.get("stops", False)), Flow([stage]))


def serve() -> None:
    for line in sys.stdin:
        spec = json.loads(line)
        child = os.fork()
        if not child:
            try:
                work(spec)
                os._exit(0)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
        if "kill_after_s" in spec:
            time.sleep(spec["kill_after_s"])
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
