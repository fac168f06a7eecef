"""The record of what each setting became, and why."""

from __future__ import annotations

import sys
import warnings
from typing import TypeVar

from headway.config.args import EngineArgs
from headway.config.settings import Choice

T = TypeVar("T")


class Choices:
    """Every field of EngineArgs ends up here."""

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self._made: dict[str, Choice] = {}

    def note(self, name: str, value: object, reason: str) -> None:
        self._made[name] = Choice(name=name, value=value, reason=reason)

    def pick(self, name: str, given: T | None, automatic: T, reason: str) -> T:
        value, why = (automatic, reason) if given is None else (given, "given")
        self.note(name, value, why)
        return value

    def default(self, name: str, reason: str) -> None:
        """Of a setting that has a default of its own."""
        self.note(name, getattr(self.args, name), "given" if self._given(name) else reason)

    def unused(self, *names: str, why: str) -> None:
        """Nothing reads them. Warns of those that were given."""
        for name in names:
            value = getattr(self.args, name)
            self.note(name, value, f"not used: {why}")
            if self._given(name):
                warnings.warn(f"{name}={value!r} is not used: {why}", RuntimeWarning, stacklevel=callers_level())

    def _given(self, name: str) -> bool:
        return getattr(self.args, name) != EngineArgs.__dataclass_fields__[name].default

    def in_order(self) -> tuple[Choice, ...]:
        names = list(EngineArgs.__dataclass_fields__)
        assert set(names) == set(self._made), set(names) ^ set(self._made)
        return tuple(self._made[name] for name in names)


def callers_level() -> int:
    """The stacklevel, for a warning of the function that asks, at which its line is the first outside headway."""
    level, frame = 1, sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("headway."):
        level, frame = level + 1, frame.f_back
    return level
