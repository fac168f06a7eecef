"""An engine in a process of its own, so that engines that are compared share nothing; idle unless it is asked to run.

    parent ── stdin: EngineArgs, then Jobs ──> python -m headway.bench.engine_process FD
           <── FD: Ready or Failed, then a Pass or Failed for each Job ──      (JSON, one message a line)

The process ends when its stdin does: also in the middle of a run, and when its parent is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from queue import SimpleQueue
from typing import IO, Any

import msgspec

from headway.bench.workload import Mode, Pass, random_prompts, run_pass
from headway.config import EngineArgs
from headway.errors import EngineError
from headway.executor.mp import own_modules

CLOSE_S = 20.0


class Job(msgspec.Struct, frozen=True, kw_only=True):
    mode: Mode
    input_len: int
    output_len: int
    num_prompts: int
    seed: int


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """facts: see report.engine_facts."""

    startup_s: float
    facts: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    message: str


_REPLY = msgspec.json.Decoder(Ready | Pass | Failed)


class EngineProcess:
    """The parent's end."""

    def __init__(self, args: EngineArgs) -> None:
        """Starts it; ready() waits until it has loaded the model."""
        reader, writer = os.pipe()
        # A session of its own: the terminal's Ctrl-C reaches only the parent, which then ends this one.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "headway.bench.engine_process", str(writer)],
            stdin=subprocess.PIPE,
            pass_fds=[writer],
            env=own_modules(),
            start_new_session=True,
        )
        os.close(writer)
        self._replies = open(reader, "rb")  # noqa: SIM115 (close() closes it)
        self.pid = self._process.pid
        self._send(args)

    def ready(self) -> Ready:
        """Raises EngineError with what the process has to say."""
        reply = self._receive()
        assert isinstance(reply, Ready)
        return reply

    def run(self, job: Job) -> Pass:
        """Raises EngineError."""
        self._send(job)
        reply = self._receive()
        assert isinstance(reply, Pass)
        return reply

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

    def _send(self, message: EngineArgs | Job) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # its replies have ended too, which says more
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()

    def _receive(self) -> Ready | Pass:
        line = self._replies.readline()
        if not line:
            raise EngineError(f"the engine's process ended with exit code {self._process.wait()}")
        reply = _REPLY.decode(line)
        if isinstance(reply, Failed):
            raise EngineError(reply.message)
        return reply


class _Child:
    def __init__(self, replies: IO[bytes]) -> None:
        self._replies = replies
        self._jobs: SimpleQueue[bytes | None] = SimpleQueue()
        self._busy = True
        threading.Thread(target=self._read, daemon=True).start()

    def serve(self) -> None:
        line = self._jobs.get()
        if line is None:
            return
        from headway.bench.report import engine_facts
        from headway.llm import LLM

        began = time.perf_counter()
        with LLM(**asdict(msgspec.json.decode(line, type=EngineArgs))) as llm:
            self._answer(Ready(startup_s=time.perf_counter() - began, facts=engine_facts(llm)))
            while (line := self._next()) is not None:
                job = msgspec.json.decode(line, type=Job)
                prompts = random_prompts(job.input_len, job.num_prompts, job.seed, llm.facts.vocab_size)
                self._answer(run_pass(llm, job.mode, prompts, job.output_len))

    def fail(self, error: Exception) -> None:
        self._answer(Failed(message=f"{type(error).__name__}: {' '.join(str(error).split())}"))

    def _next(self) -> bytes | None:
        self._busy = False
        line = self._jobs.get()
        self._busy = True
        return line

    def _answer(self, reply: Ready | Pass | Failed) -> None:
        self._replies.write(msgspec.json.encode(reply) + b"\n")
        self._replies.flush()

    def _read(self) -> None:
        # Unbuffered: nobody holds a lock that the interpreter's end waits for.
        with open(0, "rb", buffering=0, closefd=False) as lines:
            for line in lines:
                self._jobs.put(line)
        self._jobs.put(None)
        if self._busy:
            signal.raise_signal(signal.SIGINT)


def main() -> int:
    replies = open(int(sys.argv[1]), "wb")  # noqa: SIM115 (open as long as the process)
    os.set_inheritable(replies.fileno(), False)
    os.dup2(2, 1)  # what a library prints is for people
    child = _Child(replies)
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
