"""A trace of every step for chrome://tracing and ui.perfetto.dev: one track for the engine, one for the worker."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

from headway.errors import ConfigError

_ENGINE, _WORKER = 0, 1
_PHASES = ("prepare", "model", "sample")


class Trace:
    """Writes events as they come, in the JSON array format: a viewer reads the file of a killed process too."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError where the file cannot be written."""
        try:
            self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (close() closes it)
        except OSError as error:
            raise ConfigError("trace", path, f"cannot be written ({error.strerror})") from error
        self._lock = threading.Lock()  # close() comes from another thread than the events
        names = {_ENGINE: "engine", _WORKER: "worker"}
        tracks = [{"name": "thread_name", "ph": "M", "pid": 0, "tid": t, "args": {"name": n}} for t, n in names.items()]
        self._file.write("[\n" + ",\n".join(json.dumps(track) for track in tracks))

    def engine_phase(self, name: str, start: int, end: int) -> None:
        """Times are nanoseconds of the monotonic clock."""
        self._span(_ENGINE, name, start, end)

    def worker_step(self, step: int, free: int, times: Mapping[str, int], start: int, end: int) -> None:
        """A step, its phases inside it; before it, the time since ``free`` in which the worker had nothing to run."""
        if start > free:
            self._span(_WORKER, "idle", free, start)
        self._span(_WORKER, f"step {step}", start, end)
        for name in _PHASES:
            stop = min(start + times.get(name, 0), end)
            if stop > start:
                self._span(_WORKER, name, start, stop)
            start = stop

    def close(self) -> None:
        """Idempotent; what comes later is dropped."""
        with self._lock:
            if not self._file.closed:
                self._file.write("\n]\n")
                self._file.close()

    def _span(self, track: int, name: str, start: int, end: int) -> None:
        with self._lock:
            if not self._file.closed:
                times = f'"ts":{start / 1e3},"dur":{(end - start) / 1e3}'
                self._file.write(f',\n{{"name":"{name}","ph":"X","pid":0,"tid":{track},{times}}}')
