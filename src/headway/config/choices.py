"""The record of what each setting became, and why."""

from __future__ import annotations

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

    def in_order(self) -> tuple[Choice, ...]:
        names = list(EngineArgs.__dataclass_fields__)
        assert set(names) == set(self._made), set(names) ^ set(self._made)
        return tuple(self._made[name] for name in names)
