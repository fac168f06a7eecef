"""Answers rows on an engine: each is admitted as another one ends, and costs the others nothing if it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from headway.batch.rows import BadRow, Row
from headway.batch.writer import OrderedWriter
from headway.errors import RequestError
from headway.llm import AsyncLLM
from headway.messages import Completion, RequestOutput

Numbered = Iterator[tuple[int, Row | BadRow]]

WINDOWS_AHEAD = 16
"""How far, in windows, rows may be answered ahead of the oldest that runs: what waits to be written is in memory."""


@dataclass(slots=True)
class Tally:
    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    first_error: str | None = None


class BatchRun:
    """One pass over the rows of a file. on_row is called after each."""

    def __init__(self, llm: AsyncLLM, writer: OrderedWriter, on_row: Callable[[Tally], None]) -> None:
        self.tally = Tally()
        self._llm, self._writer, self._on_row = llm, writer, on_row
        # Twice what runs: the engine always finds the next request waiting.
        self._window = 2 * llm.config.scheduler.max_num_seqs
        self._moved = asyncio.Event()

    async def run(self, rows: Iterator[Row | BadRow]) -> Tally:
        numbered = enumerate(rows)
        await asyncio.gather(*(self._take(numbered) for _ in range(self._window)))
        return self.tally

    async def _take(self, numbered: Numbered) -> None:
        """Answers one row after the other; as many of these run as may be in the engine."""
        for index, row in numbered:
            while index - self._writer.next_index >= WINDOWS_AHEAD * self._window:
                await self._moved.wait()
            record = await self._answer(row)
            self._writer.put(index, record)
            self._moved.set()
            self._moved.clear()
            self._on_row(self.tally)

    async def _answer(self, row: Row | BadRow) -> dict[str, Any]:
        self.tally.rows += 1
        if isinstance(row, BadRow):
            return self._failed(row, row.error)
        try:
            output = await self._ask(row)
        except RequestError as error:
            return self._failed(row, f"line {row.line}: {error}")
        broken = next((c.error for c in output.outputs if c.finish_reason == "error"), None)
        if broken is not None:
            return self._failed(row, f"line {row.line}: {broken}")
        self.tally.prompt_tokens += output.usage["prompt_tokens"]
        self.tally.output_tokens += output.usage["completion_tokens"]
        return {**_passed_through(row), "response": response(output)}

    async def _ask(self, row: Row) -> RequestOutput:
        if row.messages is not None:
            outputs = self._llm.chat(row.messages, row.params, stream=False)
        else:
            assert row.prompt is not None, "a row has a prompt or messages"
            outputs = self._llm.generate(row.prompt, row.params, stream=False)
        (output,) = [output async for output in outputs]
        return output

    def _failed(self, row: Row | BadRow, error: str) -> dict[str, Any]:
        self.tally.failed += 1
        self.tally.first_error = self.tally.first_error or error
        return {**_passed_through(row), "line": row.line, "error": error}


def _passed_through(row: Row | BadRow) -> dict[str, Any]:
    """All of a row but what says how it went: a row of an earlier output may bring that."""
    return {name: value for name, value in row.fields.items() if name not in ("response", "error", "line")}


def response(output: RequestOutput) -> dict[str, Any]:
    """What the output file says of an answer; of several samples, all of them beside the first."""
    samples = [_sample(completion) for completion in output.outputs]
    several = {"samples": samples} if len(samples) > 1 else {}
    prompt = {} if output.prompt_logprobs is None else {"prompt_logprobs": output.prompt_logprobs}
    return {**samples[0], "usage": output.usage, **several, **prompt}


def _sample(completion: Completion) -> dict[str, Any]:
    logprobs = {} if completion.logprobs is None else {"logprobs": completion.logprobs}
    return {"text": completion.text, "finish_reason": completion.finish_reason, **logprobs}
