"""How long a thread of this process may keep the interpreter from the engine's."""

from __future__ import annotations

import sys
import threading
import weakref

INTERVAL_S = 0.0005
"""A thread that wants the interpreter asks for it after this long; Python's own 5 ms are half a step of a small model.

A 2 ms call without the interpreter, beside a thread that never rests: 13.5 ms each at 5 ms, 3.7 ms at 0.5 ms.
"""


class _Process:
    """The one setting that all engines of the process share."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage collection may call leave() inside enter()
        self._engines = 0
        self._before = 0.0

    def enter(self) -> None:
        with self._lock:
            if self._engines == 0:
                self._before = sys.getswitchinterval()
                sys.setswitchinterval(min(self._before, INTERVAL_S))
            self._engines += 1

    def leave(self) -> None:
        with self._lock:
            self._engines -= 1
            if self._engines == 0:
                sys.setswitchinterval(self._before)


_process = _Process()


def switch_soon(engine: object) -> weakref.finalize[[], object]:
    """Threads hand over within INTERVAL_S until the result is called, or the engine is no more."""
    _process.enter()
    return weakref.finalize(engine, _process.leave)
