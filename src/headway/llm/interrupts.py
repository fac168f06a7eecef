"""Ctrl-C between steps instead of inside one: an engine that is interrupted half-way could not be used again."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """While entered, on the main thread, SIGINT waits until check(), which does what the process would have done.

    A second one does it at once.
    """

    def __init__(self) -> None:
        self._handler: object = None
        self._caught: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> DeferredInterrupt:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler) and threading.current_thread() is threading.main_thread():
            self._handler = handler
            signal.signal(signal.SIGINT, self._catch)
        return self

    def check(self) -> None:
        if self._caught is not None:
            caught, self._caught = self._caught, None
            self._pass_on(*caught)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if callable(self._handler):
            signal.signal(signal.SIGINT, self._handler)
        if error is None:
            self.check()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self._caught is not None:
            self._pass_on(number, frame)
        self._caught = number, frame

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        assert callable(self._handler)
        self._handler(number, frame)
