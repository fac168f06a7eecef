"""Stop strings over text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Finds the first stop string to complete, and holds back only text that may still become one.

    The outcome depends on the text alone, not on how it is cut into pieces. Of several that complete at the same
    character the longest wins. include: the stop string stays in the text.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown now, and the stop string found in it, if any; nothing may be pushed after one."""
        if not self._stops:
            return text, None
        seen = len(self._held)
        text = self._held + text
        for end in range(seen + 1, len(text) + 1):  # so that no text is searched again, however much is held back
            if text.endswith(self._stops, 0, end):
                stop = next(stop for stop in self._stops if text.endswith(stop, 0, end))
                self._held = ""
                return text[: end if self._include else end - len(stop)], stop
        cut = len(text) - self._possible_start(text)
        self._held = text[cut:]
        return text[:cut], None

    def flush(self) -> str:
        """What is held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of the text that a stop string starts with."""
        for length in range(min(len(self._stops[0]) - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
