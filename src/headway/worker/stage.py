"""The stages of a pipeline before its last one, which is a DecoderRunner: it samples.

Every stage applies every plan, so that its batch knows lengths, blocks and what runs. The first one needs the tokens
as well: they come back some steps later, and a run waits for those that it reads.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from headway.worker.inputs import InputBuffers
from headway.worker.runner import StepUnderWay, wants_hidden

if TYPE_CHECKING:
    from headway.messages import StepPlan, StepResult
    from headway.models.decoder import Decoder
    from headway.ops.port import KVCache
    from headway.worker.batch import Batch, Runs
    from headway.worker.extras import Int32Array
    from headway.worker.link import Link, Links
    from headway.worker.program import Program
    from headway.worker.runner import Masks


class StageRunner:
    """Runs its layers over what the stage before sends, or over the embeddings, and passes the rows on."""

    def __init__(
        self,
        model: Decoder,
        kv: KVCache,
        batch: Batch,
        links: Links,
        max_tokens: int,
        stages: int,
        program: Program | None,
    ) -> None:
        assert links.rows_out is not None, "the last stage is a DecoderRunner"
        self._model, self._kv, self._batch, self._program = model, kv, batch, program
        self._rows_in, self._rows_out = links.rows_in, links.rows_out
        self._tokens = None if links.tokens is None else TokensUnderWay(batch, links.tokens, stages)
        self._inputs = InputBuffers(max_tokens, *batch.block_table.shape)

    def step(self, plan: StepPlan, masks: Masks) -> StepResult:
        step = StepUnderWay(self._batch, plan)
        if self._tokens is not None:
            self._tokens.begin(plan)
        if len(step.runs):
            if self._tokens is not None:
                self._tokens.take_for(step.runs)
                step.lap("wait")
            if self._program is not None and not wants_hidden(self._batch, step.runs):
                self._run_program(self._program, step)
            else:
                self._run_operations(step)
            if self._tokens is not None:
                self._tokens.expect(step.runs)
        self._batch.advance(step.runs)
        return step.result

    def _run_program(self, program: Program, step: StepUnderWay) -> None:
        runs, nothing = step.runs, np.empty(0, np.int32)
        x_TK = program.x[: runs.num_tokens, : self._model.spec.hidden_size]
        if self._rows_in is not None:
            self._rows_in.recv(x_TK)
            step.lap("wait")
        program.run(self._batch, runs.slots, runs.tokens, nothing, nothing)
        step.lap("model")
        self._rows_out.send(x_TK)

    def _run_operations(self, step: StepUnderWay) -> None:
        token_ids, meta = self._inputs.build(self._batch, step.runs)
        if self._rows_in is None:
            x_TK = self._model.embed_tokens(token_ids, meta.positions)
        else:
            x_TK = torch.empty(len(token_ids), self._model.spec.hidden_size)
            self._rows_in.recv(x_TK.numpy())
            step.lap("wait")
        self._model.run_layers(x_TK, meta, self._kv)
        step.lap("model")
        self._rows_out.send(x_TK.numpy())


class TokensUnderWay:
    """What the first stage has yet to hear from the last: the tokens of each step that sampled any, in order."""

    def __init__(self, batch: Batch, link: Link, stages: int) -> None:
        self._batch, self._link, self._most = batch, link, stages
        slots = len(batch.length)
        self._steps: deque[tuple[int, Int32Array, Int32Array]] = deque()  # number, slots, positions of their tokens
        self._next = 0
        self._started = np.zeros(slots, np.int64)  # the first step that a slot's request may be in
        self._sampled = np.full(slots, -1, np.int64)  # the last step that sampled for it

    def begin(self, plan: StepPlan) -> None:
        """What comes for a slot's former request is not for the one that starts."""
        slots = [start.slot for start in plan.starts]
        self._started[slots] = self._next
        self._sampled[slots] = -1

    def take_for(self, runs: Runs) -> None:
        """Waits for the tokens that these runs read. Of older steps than the engine waits for, all have come."""
        needed = int(self._sampled[runs.slots].max())
        while self._steps and (self._steps[0][0] <= needed or len(self._steps) > self._most):
            number, slots, positions = self._steps.popleft()
            tokens = np.empty(len(slots), np.int32)
            self._link.recv(tokens)
            live = self._started[slots] <= number
            self._batch.tokens[slots[live], positions[live]] = tokens[live]

    def expect(self, runs: Runs) -> None:
        """The step is over here; the batch has not advanced."""
        if len(runs.sample_rows):
            slots = runs.slots[runs.sample_rows]
            self._steps.append((self._next, slots, self._batch.length[slots]))
            self._sampled[slots] = self._next
            self._next += 1
