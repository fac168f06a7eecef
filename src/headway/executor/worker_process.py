"""A process that is one rank of an engine: ``run(ticket)``; as a program, what the mp executor starts."""

from __future__ import annotations

import os
from collections import deque
from importlib import import_module
from typing import Protocol

from headway.errors import EngineError
from headway.executor.channel import wire
from headway.executor.channel.shared import WorkerEnd
from headway.executor.child import Parent
from headway.executor.failure import failure_of
from headway.executor.launcher import Ticket
from headway.messages import StepPlan


class Link(Protocol):
    """A worker's way to its engine."""

    def receive(self) -> bytes:
        """The next message; waits for it."""
        ...

    def send(self, message: bytes) -> None: ...

    def close(self) -> None: ...


class _Closed(BaseException):
    """The engine ended while a step waited for its masks."""


class _Inbox:
    """The engine's messages in order, with masks, which may come later than what follows their plan, put aside."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._waiting: deque[wire.ToWorker] = deque()
        self._masks: dict[int, dict[int, bytes]] = {}
        self._step: int | None = None

    def next(self) -> wire.ToWorker:
        """Raises EngineError where a plan is missing: plans are deltas."""
        while True:
            message = self._waiting.popleft() if self._waiting else wire.decode_to_worker(self._link.receive())
            if isinstance(message, StepPlan):
                if self._step is not None and message.step != self._step + 1:
                    raise EngineError(f"step {message.step} came after step {self._step}: a plan was lost")
                self._step = message.step
            if not isinstance(message, wire.Masks):
                return message
            self._masks[message.step] = message.masks

    def masks(self, step: int) -> dict[int, bytes]:
        """The masks of a step; waits for them."""
        while step not in self._masks:
            message = wire.decode_to_worker(self._link.receive())
            if isinstance(message, wire.Close):
                raise _Closed
            if isinstance(message, wire.Masks):
                self._masks[message.step] = message.masks
            else:
                self._waiting.append(message)
        return self._masks[step]

    def done(self, step: int) -> None:
        """Masks up to that step are of no more use (some ranks do not sample, and never ask for theirs)."""
        if self._masks:
            self._masks = {s: masks for s, masks in self._masks.items() if s > step}


def connect(ticket: Ticket) -> Link:
    if ticket.address is not None:
        from headway.executor.channel.tcp import RemoteEnd

        return RemoteEnd(ticket.address, ticket.rank)
    assert ticket.memory is not None and ticket.layout is not None
    link = WorkerEnd(ticket.memory, ticket.layout, ticket.rank)
    os.close(ticket.memory)
    return link


def run(ticket: Ticket) -> int:
    """Serves the engine until it ends, or until loading or a step fails. The exit status for the process."""
    link = connect(ticket)
    try:
        return _serve(link, ticket)
    finally:
        link.close()


def _serve(link: Link, ticket: Ticket) -> int:
    reports = ticket.rank == ticket.config.parallel.reporting_rank
    inbox = _Inbox(link)
    worker = None
    try:
        module, _, name = ticket.worker.partition(":")
        worker = getattr(import_module(module), name)(ticket.config, ticket.rank, ticket.group)
        link.send(wire.encode(wire.Ready(worker.load())))
        while not isinstance(message := inbox.next(), wire.Close):
            if isinstance(message, StepPlan):
                result = worker.step(message, inbox.masks)
                inbox.done(message.step)
                if reports:
                    link.send(wire.encode(result))
            elif isinstance(message, wire.Call):
                link.send(_answer(worker, message))
        return 0
    except _Closed:
        return 0
    except Exception as error:
        link.send(wire.encode(failure_of(error)))
        return 1
    finally:
        if worker is not None:
            worker.close()


def _answer(worker: object, call: wire.Call) -> bytes:
    try:
        return wire.encode(wire.CallResult(call.id, getattr(worker, call.method)(*call.args)))
    except Exception as error:
        return wire.encode(failure_of(error, call.id))


def main() -> None:
    """The program that headway.executor.child starts."""
    parent = Parent()
    ticket = Ticket.decode(parent.ticket)
    parent.watch(f"headway-rank{ticket.rank}")
    parent.leave(run(ticket))


if __name__ == "__main__":
    main()
