"""A trace of every step for chrome://tracing and ui.perfetto.dev: one track for the engine, one for each rank."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path

from headway.errors import ConfigError

_ENGINE = 0  # a rank's track is its number + 1
_PHASES = ("wait", "prepare", "model", "sample")


class Trace:
    """Writes events as they come, in the JSON array format: a viewer reads the file of a killed process too."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError where the file cannot be written."""
        try:
            self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 (close() closes it)
        except OSError as error:
            raise ConfigError("trace", path, f"cannot be written ({error.strerror})") from error
        self._lock = threading.Lock()  # close() comes from another thread than the events
        self._named = {_ENGINE}
        self._file.write("[\n" + _name(_ENGINE, "engine"))

    def engine_phase(self, name: str, start: int, end: int) -> None:
        """Times are nanoseconds of the monotonic clock."""
        self._span(_ENGINE, name, start, end)

    def worker_step(self, rank: int, step: int, free: int, times: Mapping[str, int], start: int, end: int) -> None:
        """A step, its phases inside it; before it, the time since ``free`` in which the rank had nothing to run."""
        track = rank + 1
        if start > free:
            self._span(track, "idle", free, start)
        self._span(track, f"step {step}", start, end)
        for name in _PHASES:
            stop = min(start + times.get(name, 0), end)
            if stop > start:
                self._span(track, name, start, stop)
            start = stop

    def rank_steps(self, rank: int, steps: list[tuple[int, dict[str, int]]]) -> None:
        """Those of a rank that sent no results."""
        free = None
        for step, times in steps:
            start, end = times["start"], times["end"]
            self.worker_step(rank, step, start if free is None else free, times, start, end)
            free = end

    def close(self) -> None:
        """Idempotent; what comes later is dropped."""
        with self._lock:
            if not self._file.closed:
                self._file.write("\n]\n")
                self._file.close()

    def _span(self, track: int, name: str, start: int, end: int) -> None:
        with self._lock:
            if not self._file.closed:
                if track not in self._named:
                    self._named.add(track)
                    self._file.write(",\n" + _name(track, f"rank {track - 1}"))
                times = f'"ts":{start / 1e3},"dur":{(end - start) / 1e3}'
                self._file.write(f',\n{{"name":"{name}","ph":"X","pid":0,"tid":{track},{times}}}')


def _name(track: int, name: str) -> str:
    return json.dumps({"name": "thread_name", "ph": "M", "pid": 0, "tid": track, "args": {"name": name}})
