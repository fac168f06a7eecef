"""An engine in a process of its own, so that engines that are compared share nothing; idle unless it is asked to run.

    parent ── stdin: setup, then jobs ──> python -m headway.bench.engine_process FD module:Subject
           <── FD: Ready or Failed, then a result or Failed for each job ──      (JSON, one message a line)

The process ends when its stdin does: also in the middle of a run, and when its parent is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from typing import IO, Any, ClassVar, Generic, TypeVar

import msgspec

from headway.errors import EngineError
from headway.executor.child import own_modules

CLOSE_S = 20.0


S = TypeVar("S")
J = TypeVar("J")
R = TypeVar("R")


class Subject(ABC, Generic[S, J, R]):
    """What is measured, made in the process from its setup, which takes the start-up's time. types: S, J and R."""

    types: ClassVar[tuple[Any, Any, Any]]

    @abstractmethod
    def __init__(self, setup: S) -> None: ...

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What runs; see report.engine_facts."""

    @abstractmethod
    def run(self, job: J) -> R: ...

    @abstractmethod
    def close(self) -> None: ...


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """facts: the subject's."""

    startup_s: float
    facts: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    message: str


class Result(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    value: msgspec.Raw


_REPLY = msgspec.json.Decoder(Ready | Result | Failed)


class EngineProcess(Generic[S, J, R]):
    """The parent's end."""

    def __init__(self, subject: type[Subject[S, J, R]], setup: S) -> None:
        """Starts it; ready() waits until it has loaded the model."""
        self._result = msgspec.json.Decoder(subject.types[2])
        reader, writer = os.pipe()
        # A session of its own: the terminal's Ctrl-C reaches only the parent, which then ends this one.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headway.bench.engine_process", str(writer), _path_of(subject)],
            stdin=subprocess.PIPE,
            pass_fds=[writer],
            env=own_modules(),
            start_new_session=True,
        )
        os.close(writer)
        self._replies = open(reader, "rb")  # noqa: SIM115 (close() closes it)
        self.pid = self._process.pid
        self._send(setup)

    def ready(self) -> Ready:
        """Raises EngineError with what the process has to say."""
        reply = self._receive()
        assert isinstance(reply, Ready)
        return reply

    def run(self, job: J) -> R:
        """Raises EngineError."""
        self._send(job)
        reply = self._receive()
        assert isinstance(reply, Result)
        return self._result.decode(reply.value)

    def close(self) -> None:
        """Idempotent; nothing of it is left."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._replies.close()

    def _send(self, message: S | J) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # its replies have ended too, which says more
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def _receive(self) -> Ready | Result:
        line = self._replies.readline()
        if not line:
            raise EngineError(f"the engine's process ended with exit code {self._process.wait()}")
        reply = _REPLY.decode(line)
        if isinstance(reply, Failed):
            raise EngineError(reply.message)
        return reply


def _path_of(subject: type[Any]) -> str:
    return f"{subject.__module__}:{subject.__qualname__}"


class _Child:
    def __init__(self, replies: IO[bytes], subject: str) -> None:
        self._replies, self._subject = replies, subject
        self._jobs: SimpleQueue[bytes | None] = SimpleQueue()
        self._busy = False
        threading.Thread(target=self._read, daemon=True).start()

    def serve(self) -> None:
        line = self._jobs.get()
        if line is None:
            return
        began = time.perf_counter()
        module, _, name = self._subject.partition(":")
        kind: type[Subject[Any, Any, Any]] = getattr(import_module(module), name)
        setup_type, job_type, _ = kind.types
        subject = kind(msgspec.json.decode(line, type=setup_type))
        try:
            self._answer(Ready(startup_s=time.perf_counter() - began, facts=subject.facts()))
            while (line := self._jobs.get()) is not None:
                result = subject.run(msgspec.json.decode(line, type=job_type))
                self._answer(Result(value=msgspec.Raw(msgspec.json.encode(result))))
        finally:
            subject.close()

    def fail(self, error: Exception) -> None:
        self._answer(Failed(message=f"{type(error).__name__}: {' '.join(str(error).split())}"))

    def _answer(self, reply: Ready | Result | Failed) -> None:
        self._busy = False  # before there can be another job
        self._replies.write(msgspec.json.encode(reply) + b"\n")
        self._replies.flush()

    def _read(self) -> None:
        # Unbuffered: nobody holds a lock that the interpreter's end waits for.
        with open(0, "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                self._busy = True
                self._jobs.put(line)
        self._jobs.put(None)
        if self._busy:
            signal.raise_signal(signal.SIGINT)


def main() -> int:
    replies = open(int(sys.argv[1]), "wb")  # noqa: SIM115 (open as long as the process)
    os.set_inheritable(replies.fileno(), False)
    os.dup2(2, 1)  # what a library prints is for people
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have switched off: see _read()
    child = _Child(replies, sys.argv[2])
    try:
        child.serve()
    except (KeyboardInterrupt, BrokenPipeError):
        return 130
    except Exception as error:
        child.fail(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
