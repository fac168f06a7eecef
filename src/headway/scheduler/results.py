"""Step results to outputs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headway.messages import EngineOutput, StepResult
from headway.scheduler.flight import Chunk, InFlight
from headway.scheduler.sequences import Sequences
from headway.scheduler.slots import Slots


class Results:
    """accept(request id, token): told each token of structured requests; False ends the request with an error."""

    def __init__(self, sequences: Sequences, accept: Callable[[str, int], bool] | None) -> None:
        self._sequences, self._accept = sequences, accept
        self._slots = sequences.slots

    def take(self, flight: InFlight, result: StepResult) -> list[EngineOutput]:
        """Outputs for requests that ended or stream."""
        tokens = np.frombuffer(result.tokens, np.int32)
        assert flight.step == result.step, f"result of step {result.step}, expected {flight.step}"
        assert tokens.size == flight.slots.size, f"{tokens.size} tokens for {flight.slots.size} runs"
        slots = flight.slots
        live = self._slots.epoch[slots] == flight.epochs
        outputs: list[EngineOutput] = []
        if flight.chunks:
            first = slots.size - len(flight.chunks)
            for row, chunk in enumerate(flight.chunks, first):
                if live[row]:
                    self._take_chunk(chunk, bool(tokens[row] >= 0), result, outputs)
            live &= tokens >= 0
        if not live.all():
            slots, tokens = slots[live], tokens[live]
        assert not slots.size or tokens.min() >= 0, "a decode came back without a token"
        if slots.size:
            self._take_tokens(slots, tokens, flight, result, outputs)
        return outputs

    def _take_chunk(self, chunk: Chunk, sampled: bool, result: StepResult, outputs: list[EngineOutput]) -> None:
        """A piece of a live request's prompt is computed."""
        state, slot = chunk.state, chunk.state.slot
        complete = chunk.end == self._slots.known[slot]
        assert sampled == (complete and state.request.pooling is None), f"{state.id}: sampled={sampled} at {chunk.end}"
        if self._sequences.caching:
            self._sequences.register(state, chunk.end)
        if state.wants_prompt_logprobs:
            state.prompt_logprobs.extend(result.prompt_logprobs[slot])
        if not complete:
            return
        state.prefilled = True
        if state.request.pooling is not None:
            outputs.append(self._sequences.finish(state, "stop", pooled=result.pooled[slot]))

    def _take_tokens(
        self,
        slots: Slots,
        tokens: npt.NDArray[np.int32],
        flight: InFlight,
        result: StepResult,
        outputs: list[EngineOutput],
    ) -> None:
        """A new token for each of these slots, all live."""
        ended = self._slots.append(slots, tokens)
        self._sequences.stats.generated_tokens += slots.size
        if result.logprobs:
            for slot in slots.tolist():
                if slot in result.logprobs:
                    self._slots.occupant(slot).logprobs.append(result.logprobs[slot])
        refused = self._refused(slots, tokens, flight.masked) if flight.masked else ()
        report = ended | self._slots.stream[slots]
        if refused:
            report |= np.isin(slots, refused)
        rows = np.flatnonzero(report)
        for slot, token, end in zip(slots[rows].tolist(), tokens[rows].tolist(), ended[rows].tolist()):
            state = self._slots.occupant(slot)
            if slot in refused:
                outputs.append(
                    self._sequences.finish(state, "error", error=f"token {token} does not fit the constraint")
                )
            elif not end:
                outputs.append(self._sequences.output(state))
            elif token in state.request.stop_token_ids:
                outputs.append(self._sequences.finish(state, "stop", stop_reason=state.named_stop(token)))
            else:
                outputs.append(self._sequences.finish(state, "length"))

    def _refused(self, slots: Slots, tokens: npt.NDArray[np.int32], masked: list[int]) -> list[int]:
        """Tells ``accept`` the new tokens of structured requests; slots whose constraint forbids theirs."""
        assert self._accept is not None, "a structured request needs accept"
        new = dict(zip(slots.tolist(), tokens.tolist()))
        return [s for s in masked if s in new and not self._accept(self._slots.occupant(s).id, new[s])]
