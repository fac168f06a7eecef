"""Stop strings over text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to complete, and holds back only text that may still become one.

    The outcome depends on the text alone, not on how it is cut into pieces. Of several that complete at the same
    character the longest wins. include: the stop string stays in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string found in it, if any; nothing may be pushed after one."""
        text = self._held + text
        found = self._first(text)
        if found is not None:
            end, stop = found
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        cut = len(text) - self._possible_start(text)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What is held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _first(self, text: str) -> tuple[int, str] | None:
        """(end, stop) of the match that ends first."""
        best: tuple[int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or start + len(stop) < best[0]):
                best = start + len(stop), stop
        return best

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        longest = len(self._stops[0]) - 1 if self._stops else 0
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
