"""Prompts from the columns of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from headway.errors import ConfigError, RequestError


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A row's prompt: the template, with columns in the place of their names in braces. Two braces stand for one.

    chat: it is what the user says in a conversation, where it otherwise is the text that the model goes on from.
    """

    text: str
    chat: bool = False

    def __post_init__(self) -> None:
        try:
            names = self._names()
        except ValueError as error:
            raise ConfigError(self.option, self.text, f"must have columns in braces, as in {{text}}: {error}") from None
        if not names or not all(name.isidentifier() for name in names):
            raise ConfigError(self.option, self.text, "must have the names of columns in braces, as in {text}")

    def _names(self) -> list[str]:
        return [name for _, name, _, _ in Formatter().parse(self.text) if name is not None]

    @property
    def option(self) -> str:
        return "message_template" if self.chat else "prompt_template"

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            text = self.text.format_map(row)
        except KeyError as missing:
            raise RequestError(self.option, self.text, f"the row has no column {missing}") from None
        for name in self._names():
            if row[name] is None:  # a missing one, in a file of columns
                raise RequestError(self.option, self.text, f"the row's {name!r} is null")
        return {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}
