"""Executes step plans on a model: a decoder over its paged cache, or an encoder over whole prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch

from headway.messages import PoolingParams, RowLogprobs, StepPlan, StepResult
from headway.worker.batch import Batch, Runs
from headway.worker.extras import Float32Array, Int32Array, Kind
from headway.worker.inputs import InputBuffers, prompt_inputs
from headway.worker.logprobs import row_logprobs
from headway.worker.program import Program, Want
from headway.worker.sampler import Sampler

if TYPE_CHECKING:
    from torch import Tensor

    from headway.models.decoder import Decoder
    from headway.models.port import CausalModel, EncoderModel
    from headway.ops.port import KVCache
    from headway.worker.link import Links

Masks = Callable[[int], dict[int, bytes]]

_LOGITS_BYTES = 64 << 20  # the most logits held at once: 341 rows of SmolLM2, 110 of Qwen2


class Runner(Protocol):
    def step(self, plan: StepPlan, masks: Masks) -> StepResult:
        """Executes one plan. masks(step) gives its token masks by slot; called after the forward pass, if at all."""
        ...


class DecoderRunner:
    """Generates and pools with a decoder; simple steps run as one program where the model has one.

    links: of the last stage of a pipeline, whose rows come from the stage before (see stage.py for the others).
    """

    def __init__(
        self,
        model: CausalModel,
        kv: KVCache,
        batch: Batch,
        max_tokens: int,
        program: Program | None = None,
        links: Links | None = None,
    ) -> None:
        self._model, self._kv, self._batch, self._program = model, kv, batch, program
        self._inputs = InputBuffers(max_tokens, *batch.block_table.shape)
        self._sampler = Sampler(model.vocab_size)
        self._max_rows = max(1, _LOGITS_BYTES // (4 * model.vocab_size))
        self._links = links
        self._steady = False  # the last step was one token for each run, all of them chosen by the program

    def step(self, plan: StepPlan, masks: Masks) -> StepResult:
        if self._steady and plan.runs is None and not (plan.starts or plan.releases or plan.masked_slots):
            return self._repeat(plan)
        self._steady = False
        step = StepUnderWay(self._batch, plan)
        if len(step.runs):
            if self._program is not None and not wants_hidden(self._batch, step.runs):
                self._run_program(self._program, step, masks)
            else:
                self._run_operations(step, masks)
        result = step.finish()
        if self._links is not None and len(step.runs.sample_rows):
            assert self._links.tokens is not None, "the last stage of several"
            self._links.tokens.send(np.frombuffer(result.tokens, np.int32)[step.runs.sample_rows])
        return result

    def _repeat(self, plan: StepPlan) -> StepResult:
        """The steady state. A step has swept the caches, and Python that runs cold costs several times its usual."""
        assert self._program is not None
        began = time.perf_counter_ns()
        self._batch.append_blocks(plan.blocks)
        tokens = self._program.repeat().tobytes()
        times_ns = {"prepare": 0, "model": time.perf_counter_ns() - began, "sample": 0}
        return StepResult(step=plan.step, tokens=tokens, times_ns=times_ns)

    def _run_program(self, program: Program, step: StepUnderWay, masks: Masks) -> None:
        batch, runs = self._batch, step.runs
        slots = runs.slots[runs.sample_rows]
        want = _wants(batch.kind[slots])
        step.lap("prepare")
        if self._links is not None:
            self._receive(step, program.x[: runs.num_tokens])
        batch.tokens[slots, batch.length[slots]] = program.run(batch, runs.slots, runs.tokens, runs.sample_rows, want)
        step.lap("model")
        simple = not (want == Want.LOGITS).any() and self._links is None
        self._steady = simple and len(slots) == len(runs) and bool((runs.tokens == 1).all())
        masks_by_slot = step.wait_for(masks)
        for row in np.flatnonzero(want == Want.LOGITS).tolist():
            logits_1V = program.logits(row)[np.newaxis]
            step.result.logprobs |= self._sampler.sample(logits_1V, batch, slots[row : row + 1], masks_by_slot)
        step.lap("sample")

    def _run_operations(self, step: StepUnderWay, masks: Masks) -> None:
        token_ids, meta = self._inputs.build(self._batch, step.runs)
        step.lap("prepare")
        if self._links is None:
            hidden_TK = self._model.forward(token_ids, meta, self._kv)
        else:
            model = cast("Decoder", self._model)
            x_TK = torch.empty(len(token_ids), model.spec.hidden_size)
            self._receive(step, x_TK.numpy())
            model.run_layers(x_TK, meta, self._kv)
            hidden_TK = model.finish(x_TK)
        step.lap("model")
        last_R = meta.query_start[1:].numpy() - 1
        self._sample(step, hidden_TK, last_R, step.wait_for(masks))
        self._pool(step, hidden_TK, last_R)
        self._report_prompts(step, hidden_TK, last_R)

    def _receive(self, step: StepUnderWay, x_TK: Float32Array) -> None:
        assert self._links is not None and self._links.rows_in is not None, "the last stage of several"
        self._links.rows_in.recv(x_TK[:, : cast("Decoder", self._model).spec.hidden_size])
        step.lap("wait")

    def _sample(self, step: StepUnderWay, hidden_TK: Tensor, last_R: Int32Array, masks: dict[int, bytes]) -> None:
        slots = step.runs.slots[step.runs.sample_rows]
        for rows, logits_RV in self._logits(step, hidden_TK, last_R[step.runs.sample_rows]):
            step.result.logprobs |= self._sampler.sample(logits_RV, self._batch, slots[rows], masks)
            step.lap("sample")

    def _pool(self, step: StepUnderWay, hidden_TK: Tensor, last_R: Int32Array) -> None:
        rows = step.runs.pool_rows
        if len(rows):
            step.pool(rows, lambda params: self._model.pool(hidden_TK[torch.from_numpy(last_R[rows])], params))

    def _report_prompts(self, step: StepUnderWay, hidden_TK: Tensor, last_R: Int32Array) -> None:
        """Position p's row describes prompt token p + 1; the prompt's last position has none."""
        batch, runs = self._batch, step.runs
        for run in np.flatnonzero(batch.kind[runs.slots] & Kind.PROMPT_LOGPROBS).tolist():
            slot, num_tokens = int(runs.slots[run]), int(runs.tokens[run])
            count = batch.extras[slot].prompt_logprobs
            assert count is not None
            following = batch.tokens[slot, batch.computed[slot] + 1 : batch.prompt_len[slot]][:num_tokens].tolist()
            tokens_R = np.arange(len(following), dtype=np.int32) + (last_R[run] + 1 - num_tokens)
            reports: list[RowLogprobs] = []
            for rows, logits_RV in self._logits(step, hidden_TK, tokens_R):
                pairs = zip(logits_RV, following[rows], strict=True)
                reports += [row_logprobs(logits_V, token, count) for logits_V, token in pairs]
                step.lap("sample")
            if reports:
                step.result.prompt_logprobs[slot] = reports

    def _logits(
        self, step: StepUnderWay, hidden_TK: Tensor, tokens_R: Int32Array
    ) -> Iterator[tuple[slice, Float32Array]]:
        """Logits of some of the step's tokens, as many rows at a time as memory allows."""
        for begin in range(0, len(tokens_R), self._max_rows):
            rows = slice(begin, begin + self._max_rows)
            logits_RV = self._model.logits(hidden_TK[torch.from_numpy(tokens_R[rows])]).numpy()
            step.lap("model")
            yield rows, logits_RV


def wants_hidden(batch: Batch, runs: Runs) -> bool:
    """Whether more is asked of a step than tokens, which is all that programs give."""
    kinds = batch.kind[runs.slots]
    reports = batch.computed[runs.slots] < batch.prompt_len[runs.slots] - 1  # where there is anything left to report
    return bool((kinds & (Kind.POOL | np.where(reports, Kind.PROMPT_LOGPROBS, 0))).any())


def _wants(kinds: Int32Array) -> Int32Array:
    simple = np.where(kinds & Kind.GREEDY, np.int32(Want.ARGMAX), np.int32(Want.SAMPLE))
    return np.where(kinds & Kind.ADJUSTED, np.int32(Want.LOGITS), simple)


class EncoderRunner:
    """Pools whole prompts, each in the step that starts it."""

    def __init__(self, model: EncoderModel, batch: Batch) -> None:
        self._model, self._batch = model, batch

    def step(self, plan: StepPlan, masks: Masks) -> StepResult:
        step = StepUnderWay(self._batch, plan)
        if len(step.runs):
            assert len(step.runs.pool_rows) == len(step.runs), "an encoder takes whole prompts"
            token_ids, token_types, query_start, longest = prompt_inputs(self._batch, step.runs)
            step.lap("prepare")
            hidden_TK = self._model.forward(token_ids, token_types, query_start, longest)
            step.lap("model")
            step.pool(step.runs.pool_rows, lambda params: self._model.pool(hidden_TK, query_start, params))
        return step.finish()


class StepUnderWay:
    """One step under way: its runs, its result so far, and where its time went."""

    def __init__(self, batch: Batch, plan: StepPlan) -> None:
        self._last_ns = time.perf_counter_ns()
        self._batch, self._plan = batch, plan
        self.runs = batch.apply(plan)
        self.result = StepResult(step=plan.step, times_ns={"prepare": 0, "model": 0, "sample": 0})

    def lap(self, name: str) -> None:
        """The time since the last lap went to ``name``."""
        now = time.perf_counter_ns()
        self.result.times_ns[name] = self.result.times_ns.get(name, 0) + now - self._last_ns
        self._last_ns = now

    def wait_for(self, masks: Masks) -> dict[int, bytes]:
        return masks(self._plan.step) if self._plan.masked_slots else {}

    def pool(self, rows: Int32Array, compute: Callable[[list[PoolingParams]], list[Tensor]]) -> None:
        slots = self.runs.slots[rows].tolist()
        vectors = compute([self._batch.extras[slot].pooling or PoolingParams() for slot in slots])
        self.result.pooled = {s: v.float().numpy().tobytes() for s, v in zip(slots, vectors, strict=True)}
        self.lap("sample")

    def finish(self) -> StepResult:
        """Reads the sampled tokens and lets the batch advance over them."""
        runs, batch = self.runs, self._batch
        tokens = np.full(len(runs), -1, np.int32)
        slots = runs.slots[runs.sample_rows]
        tokens[runs.sample_rows] = batch.tokens[slots, batch.length[slots]]
        self.result.tokens = tokens.tobytes()
        batch.advance(runs)
        return self.result
