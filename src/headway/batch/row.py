"""A row on its way through a job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from headway.errors import WorkerError


@dataclass(frozen=True, slots=True)
class RowError:
    """Why a row has no answer: the exception's type and message, and the stage in which it was raised."""

    type: str
    message: str
    stage: str


@dataclass(slots=True, eq=False)
class Row:
    """index: its place among its input's. data: what stages read and add to. source: the input's columns.

    input_tokens, output_tokens: of all samples, as the engine counted them.
    """

    index: int
    data: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict[str, Any])
    error: RowError | None = None
    input_tokens: int = 0
    output_tokens: int = 0

    @classmethod
    def of(cls, index: int, source: dict[str, Any]) -> Row:
        return cls(index, dict(source), source)

    def fail(self, error: BaseException, stage: str) -> None:
        kind = error.kind if isinstance(error, WorkerError) else type(error).__name__
        message = error.message if isinstance(error, WorkerError) else str(error)
        self.error = RowError(kind, message or kind, stage)

    def record(self) -> dict[str, Any]:
        """The output row: what the stages made of it, or the input's columns and the error."""
        if self.error is None:
            return self.data
        error = self.error
        return {**self.source, "error": {"type": error.type, "message": error.message, "stage": error.stage}}


OPEN_COLUMNS = ("sampling_params", "pooling_params", "request_kwargs", "tools")
"""Objects whose fields differ from row to row. Arrow's rows share a struct: null is what a row did not give."""


def without_nulls(value: Any) -> Any:
    """Of the fields of objects, however deep."""
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


Done = Callable[[list[Row]], None]
