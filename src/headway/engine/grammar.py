"""The port behind which structured-output libraries live. Knows no model; a matcher walks one request's tokens."""

from __future__ import annotations

from typing import Protocol

from headway.messages import StructuredOutput


class Matcher(Protocol):
    """The state of one constrained request."""

    def mask(self) -> bytes:
        """Packed bits, ceil(vocab / 32) little-endian 32-bit words: bit t of the whole says token t may come next.

        End-of-sequence ids are allowed exactly where the text is complete.
        """
        ...

    def accept(self, token_id: int) -> bool:
        """Advances over one generated token; False if the constraint forbids it."""
        ...


class GrammarBackend(Protocol):
    def compile(self, constraint: StructuredOutput) -> Matcher:
        """Raises RequestError naming the constraint's field when it cannot be compiled. Bounded in time and memory."""
        ...
