"""Rows through an engine: rendered, tokenised, generated or pooled, and detokenised, each as the engine has room.

An engine that fails is replaced and its rows run again: all of them together at first, and those that fail with it
twice one at a time, so that a row that kills engines is found and costs the others nothing but time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from headway.batch.engines import Lease
from headway.batch.flow import Fail
from headway.batch.params import ParamsReader
from headway.batch.row import Done, Row
from headway.errors import RequestError
from headway.llm import AsyncLLM
from headway.llm.chat import is_begun
from headway.llm.prompts import PromptInput
from headway.llm.scoring import Scoring
from headway.llm.stream import Answer, PromptStream
from headway.messages import Completion, PooledOutput, PoolingParams, RequestOutput, SamplingParams

Task = Literal["generate", "embed", "classify", "score"]

MAX_FAILURES = 5
"""Engines that may fail one after the other, no row answered, before the job ends."""


@dataclass(slots=True, eq=False)
class _Entry:
    """failures: engines that failed while the row was in them. scoring: of a pair, whose prompts are one or two."""

    row: Row
    done: Done
    failures: int = 0
    scoring: Scoring | None = None
    outputs: list[PooledOutput] = field(default_factory=list[PooledOutput])


@dataclass(slots=True)
class EngineCounts:
    """Tokens of the rows answered so far, and engines that were replaced."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    restarts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """sampling: defaults of rows. template: of ChatRenderer.render. render, tokenize: False if done before."""

    task: Task = "generate"
    render: bool = True
    tokenize: bool = True
    max_pending: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict[str, Any])
    template: dict[str, Any] = field(default_factory=dict[str, Any])


class EngineStage:
    """Rows have messages, prompt or tokenized_prompt, of which the first that is there counts; pairs text_1, text_2."""

    name = "engine"

    def __init__(self, lease: Lease, options: EngineOptions) -> None:
        self.counts = EngineCounts()
        self._lease, self._options = lease, options
        self._generates = options.task == "generate"
        if self._generates:
            self._params = ParamsReader(SamplingParams, options.sampling)
        else:
            self._params = ParamsReader(PoolingParams, {"task": options.task})
        self._waiting: deque[_Entry] = deque()  # for an engine
        self._alone: deque[_Entry] = deque()  # each for an engine of its own
        self._inside: set[_Entry] = set()
        self._lost: list[_Entry] = []
        self._failures = 0
        self._stream: PromptStream[_Entry] | None = None
        self._renewal: asyncio.Task[None] | None = None

    @property
    def llm(self) -> AsyncLLM:
        """The engine that is used now; only after open()."""
        return self._llm

    @property
    def window(self) -> int:
        """Twice what runs: the engine always finds the next request waiting."""
        return self._options.max_pending or 2 * self._llm.config.scheduler.max_num_seqs

    @property
    def inside(self) -> list[Row]:
        """What is in the engine, running or waiting."""
        return [entry.row for entry in self._inside]

    async def open(self, fail: Fail) -> None:
        self._fail = fail
        self._use(await self._lease.open())

    def submit(self, rows: list[Row], done: Done) -> None:
        self._waiting.extend(_Entry(row, done) for row in rows)
        self._admit()

    def drop(self, rows: Container[Row]) -> None:
        """Ends those that are still here; nobody hears of them."""
        gone = {entry for entry in self._inside if entry.row in rows}
        self._inside -= gone
        for queue in (self._waiting, self._alone, self._lost):
            left = [entry for entry in queue if entry.row not in rows]
            queue.clear()
            queue.extend(left)
        if self._stream is not None:
            self._stream.drop(gone)
        self._admit()

    async def close(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait({self._renewal})
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._inside.clear()

    def _use(self, llm: AsyncLLM) -> None:
        self._llm, self._stream = llm, llm.stream(self._take)

    def _admit(self) -> None:
        if self._stream is None or self._renewal is not None:
            return
        entries: list[_Entry] = []
        if not self._alone:
            entries, self._waiting = list(self._waiting), deque()
        elif not self._inside:
            entries = [self._alone.popleft()]
        if not entries:
            return
        keys: list[_Entry] = []
        prompts: list[PromptInput] = []
        params: list[Any] = []
        for entry in entries:
            try:
                mine, one = self._prompts(entry), self._row_params(entry)
            except Exception as error:
                self._fail_row(entry, error)
                continue
            self._inside.add(entry)
            for prompt in mine:
                keys.append(entry)
                prompts.append(prompt)
                params.append(one)
        try:
            self._stream.submit(keys, prompts, params)
        except Exception as error:
            self._fail(error)

    def _row_params(self, entry: _Entry) -> SamplingParams | PoolingParams:
        if entry.scoring is not None:
            return entry.scoring.params
        field = "sampling_params" if self._generates else "pooling_params"
        return self._params.read(field, entry.row.data.get(field))

    def _prompts(self, entry: _Entry) -> list[PromptInput]:
        """One; a pair may have two."""
        data = entry.row.data
        ids, text, messages = (_plain(data.get(name)) for name in ("tokenized_prompt", "prompt", "messages"))
        if messages is not None and self._options.render:
            template = {"continue_final_message": is_begun(messages), **self._options.template, "tools": _tools(data)}
            return [self._llm.chat_prompt(messages, **template)]
        if isinstance(text, list):  # of token ids
            return [PromptInput(token_ids=text)]
        if text is not None and (ids is None or self._options.tokenize):
            return [PromptInput(text=text, add_special_tokens=messages is None)]  # a chat template has written them
        if ids is not None:
            return [PromptInput(token_ids=ids)]
        if self._options.task == "score" and "text_1" in data and "text_2" in data:
            entry.outputs, entry.scoring = [], self._llm.scoring(data["text_1"], data["text_2"])
            return entry.scoring.prompts
        pair = ", or text_1 and text_2" if self._options.task == "score" else ""
        raise RequestError("row", sorted(data), f"must have one of messages, prompt, tokenized_prompt{pair}")

    # Answers ----------------------------------------------------------------------------------------------------------

    def _take(self, answers: list[tuple[_Entry, Answer]]) -> None:
        done: dict[Done, list[Row]] = {}
        for entry, answer in answers:
            if entry not in self._inside or not self._is_whole(entry, answer):
                continue
            self._inside.discard(entry)
            if isinstance(answer, BaseException) and not isinstance(answer, RequestError):
                self._lose(entry, answer)
                continue
            self._failures = 0
            try:
                self._settle(entry, answer)
            except Exception as error:
                entry.row.fail(error, self.name)
            done.setdefault(entry.done, []).append(entry.row)
        for call, rows in done.items():
            call(rows)
        self._admit()

    def _is_whole(self, entry: _Entry, answer: Answer) -> bool:
        if entry.scoring is None or not isinstance(answer, PooledOutput):
            return True
        entry.outputs.append(answer)
        return len(entry.outputs) == len(entry.scoring.prompts)

    def _settle(self, entry: _Entry, answer: RequestOutput | PooledOutput | RequestError) -> None:
        if isinstance(answer, RequestError):
            entry.row.fail(answer, self.name)
        elif isinstance(answer, RequestOutput):
            self._generated(entry.row, answer)
        elif entry.scoring is None:
            self._pooled(entry.row, answer)
        else:  # of a pair: which of the two outputs came first makes no difference
            self._pooled(entry.row, entry.scoring.results(entry.outputs)[0])

    def _fail_row(self, entry: _Entry, error: BaseException) -> None:
        entry.row.fail(error, self.name)
        entry.done([entry.row])

    def _generated(self, row: Row, output: RequestOutput) -> None:
        broken = next((sample.error for sample in output.outputs if sample.finish_reason == "error"), None)
        if broken is not None:
            row.fail(RequestError("structured", broken, "could not be followed"), self.name)
            return
        first, usage, data = output.outputs[0], output.usage, row.data
        if output.prompt is not None:
            data["prompt"] = output.prompt
        data["prompt_token_ids"] = output.prompt_token_ids
        data["num_input_tokens"] = usage["prompt_tokens"]
        data["num_cached_tokens"] = usage["cached_tokens"]
        data |= self._sample(first, data)
        if output.prompt_logprobs is not None:
            data["prompt_logprobs"] = output.prompt_logprobs
        if len(output.outputs) > 1:
            data["outputs"] = [self._sample(sample, data) for sample in output.outputs]
        row.input_tokens, row.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        self.counts.prompt_tokens += usage["prompt_tokens"]
        self.counts.output_tokens += usage["completion_tokens"]
        self.counts.cached_tokens += usage["cached_tokens"]

    def _sample(self, sample: Completion, data: dict[str, Any]) -> dict[str, Any]:
        columns: dict[str, Any] = {
            "generated_text": sample.text,
            "generated_tokens": sample.token_ids,
            "num_generated_tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if sample.logprobs is not None:
            columns["logprobs"] = sample.logprobs
        if _tools(data):
            content, calls = self._llm.tools.parse(sample.text)
            if calls:
                columns |= {"generated_text": content, "tool_calls": calls, "finish_reason": "tool_calls"}
        return columns

    def _pooled(self, row: Row, output: PooledOutput) -> None:
        row.data["num_input_tokens"] = row.input_tokens = len(output.prompt_token_ids)
        row.data["num_cached_tokens"] = output.num_cached_tokens
        row.data["embeddings"] = np.array(output.data, np.float32)
        self.counts.prompt_tokens += len(output.prompt_token_ids)
        self.counts.cached_tokens += output.num_cached_tokens

    # An engine that failed --------------------------------------------------------------------------------------------

    def _lose(self, entry: _Entry, error: BaseException) -> None:
        if self._renewal is None:  # from here on no row enters the one that failed
            self._renewal = asyncio.get_running_loop().create_task(self._renew(error))
        entry.failures += 1
        if entry.failures > 2:  # it ran alone
            self._fail_row(entry, error)
        else:
            self._lost.append(entry)

    async def _renew(self, error: BaseException) -> None:
        self._failures += 1
        try:
            if self._failures > MAX_FAILURES:
                raise error
            llm = await self._lease.open(broken=self._llm)
        except Exception as failure:
            self._fail(failure)
            return
        self.counts.restarts += 1
        lost, self._lost = self._lost, []
        self._alone.extend(entry for entry in lost if entry.failures == 2)
        self._waiting.extendleft(entry for entry in reversed(lost) if entry.failures == 1)
        self._use(llm)
        self._renewal = None
        self._admit()


def _tools(data: dict[str, Any]) -> Any:
    return _plain(data.get("tools")) or None


def _plain(value: Any) -> Any:
    """Arrow and numpy give lists as arrays."""
    return value.tolist() if isinstance(value, np.ndarray) else value
