"""A server as its users start it: a process, a port, a real model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

READY = re.compile(r"headway: (\S+) serves")
START_S = 120
ROOT = Path(__file__).parents[2]


class Served:
    """A running ``headway serve``. url: without a path. log: what it has written to stderr so far."""

    def __init__(self, *words: str) -> None:
        command = [Path(sys.executable).with_name("headway"), "serve", *words, "--port", "0"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for executors of tests
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self.log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._ready.wait(START_S), self.log
        found = READY.search("".join(self.log))
        assert found, self.log
        self.url = found.group(1)

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """The exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return status

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if READY.search(line):
                self._ready.set()
        self._ready.set()


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """SmolLM2 under default settings; shared by all tests that leave it as it was."""
    server = Served("smollm2-135m-instruct", "--threads", "1")
    yield server
    assert server.end() == 0, server.log


@pytest.fixture(scope="module")
def wide() -> Iterator[Served]:
    """Without a model: what is slow, or fails, is the server. It waits for its clients for a second."""
    executor = ("--distributed-executor-backend", "tests.server.wide:Wide")
    server = Served("smollm2-135m-instruct", *executor, "--client-timeout", "1")
    yield server
    assert server.end() == 0, server.log
    assert len(server.log) == 1, "clients have written to the log"
