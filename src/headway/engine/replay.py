"""What an engine that starts again must do to be like those that went on."""

from __future__ import annotations

from headway.engine.wire import Method

Act = tuple[Method, list[int | str]]
GONE = ""
"""In place of a path: weights that came from a file which is no more."""


class Replay:
    """Of the actions so far, those that still matter."""

    def __init__(self) -> None:
        self._weights: str | None = None  # of an engine that is awake; None: those that it starts with
        self._since: list[Act] = []  # since it fell asleep

    def done(self, method: Method, *args: int | str) -> None:
        if method == "sleep":
            self._since.append((method, list(args)))
        elif method == "wake_up":
            self._wake_up()
        elif self._since:
            self._since = [act for act in self._since if act[0] == "sleep"] + [(method, list(args))]
        else:
            self._weights = str(args[0])

    @property
    def fit(self) -> bool:
        """Whether it can be like them."""
        return GONE not in (path for method, (path, *_) in self.acts if method == "update_weights")

    @property
    def acts(self) -> list[Act]:
        first: list[Act] = [] if self._weights is None else [("update_weights", [self._weights])]
        return first + self._since

    def _wake_up(self) -> None:
        for method, args in self._since:
            if method == "update_weights":
                self._weights = str(args[0])
            elif args == [2]:
                self._weights = None  # read again
        self._since = []
