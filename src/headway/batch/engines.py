"""Who uses which engine: each processor its own, or several one that has a name; started when first needed.

An engine is there as long as a lease on it is. One that fails is replaced, once, whoever finds out.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from headway.errors import ConfigError, EngineError
from headway.llm import AsyncLLM

T = TypeVar("T")


class _Engine:
    """One engine, of any number of leases and event loops."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.leases = 0
        self._llm: AsyncLLM | None = None
        self._elsewhere: Any = None
        self._lock = threading.Lock()

    def get(self, broken: AsyncLLM | None) -> AsyncLLM:
        """Starts one if there is none but ``broken``. Takes seconds."""
        with self._lock:
            if self._llm is None or self._llm is broken:
                self._end()
                self._llm = AsyncLLM(**self.settings)
            return self._llm

    def elsewhere(self, make: Callable[[], T]) -> T:
        with self._lock:
            if self._elsewhere is None:
                self._elsewhere = make()
            return self._elsewhere

    def close(self) -> None:
        with self._lock:
            self._end()
            if self._elsewhere is not None:
                self._elsewhere.close()

    def _end(self) -> None:
        llm, self._llm = self._llm, None
        if llm is not None:
            with suppress(EngineError):  # it has failed before
                llm.close()


_lock = threading.Lock()
_shared: dict[str, _Engine] = {}


class Lease:
    """settings: of AsyncLLM. shared: the name under which other leases of this process have the same engine.

    ConfigError for other settings than those of the shared engine that is there. Ends with close(), with the object, or
    with the program.
    """

    def __init__(self, settings: dict[str, Any], shared: str | None = None) -> None:
        with _lock:
            engine = _Engine(settings) if shared is None else _shared.setdefault(shared, _Engine(settings))
            if engine.settings != settings:
                raise ConfigError("shared", shared, f"the engine of this name has other settings: {engine.settings}")
            engine.leases += 1
        self._engine = engine
        self.close = weakref.finalize(self, _give_back, engine, shared)

    async def open(self, broken: AsyncLLM | None = None) -> AsyncLLM:
        """The engine, which is started if there is none. broken: the one that failed, which is to be replaced."""
        return await asyncio.to_thread(self._engine.get, broken)

    def elsewhere(self, make: Callable[[], T]) -> T:
        """What stands for this engine in other processes; made once for all leases, closed with the last one."""
        return self._engine.elsewhere(make)


def _give_back(engine: _Engine, shared: str | None) -> None:
    with _lock:
        engine.leases -= 1
        if engine.leases:
            return
        if shared is not None:
            del _shared[shared]
    engine.close()
