"""Per-slot state as a structure of arrays, so that steady decode costs a few array operations whatever the batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headway.scheduler.state import RequestState

Slots = npt.NDArray[np.int64]

STOPS_INLINE = 8


class SlotTable:
    """All [slots] unless said otherwise; S slots, L = max_model_len.

    tokens: [S, L] int32, known[s] of them valid. computed: positions planned so far. While a slot decodes,
    computed + 1 tokens exist or are being sampled. limit: tokens at which it ends. stops: [S, 8] int32, -1 is none;
    longer lists go to ``many_stops``. epoch: grows each time the slot is vacated, so that the result of a step in
    flight never reaches a later occupant. decoding: it runs one token in the next plan.
    """

    def __init__(self, num_slots: int, max_model_len: int) -> None:
        self.tokens = np.empty((num_slots, max_model_len), np.int32)
        self.known = np.zeros(num_slots, np.int64)
        self.computed = np.zeros(num_slots, np.int64)
        self.limit = np.zeros(num_slots, np.int64)
        self.stops = np.full((num_slots, STOPS_INLINE), -1, np.int32)
        self.epoch = np.zeros(num_slots, np.int64)
        self.decoding = np.zeros(num_slots, np.bool_)
        self.stream = np.zeros(num_slots, np.bool_)
        self.masked = np.zeros(num_slots, np.bool_)
        self.many_stops: dict[int, frozenset[int]] = {}
        self._occupants: list[RequestState | None] = [None] * num_slots
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def occupied(self) -> int:
        return len(self._occupants) - len(self._free)

    def occupant(self, slot: int) -> RequestState:
        state = self._occupants[slot]
        assert state is not None, f"slot {slot} is empty"
        return state

    def next_free(self) -> int:
        return self._free[-1]

    def enter(self, state: RequestState, computed: int) -> None:
        """Puts a waiting request into ``next_free()``."""
        slot = self._free.pop()
        size = len(state.tokens)
        self._occupants[slot] = state
        self.tokens[slot, :size] = state.tokens
        self.known[slot] = size
        self.computed[slot] = computed
        self.limit[slot] = state.max_computed + 1
        self.decoding[slot] = False
        self.stream[slot] = state.request.stream
        self.masked[slot] = state.masked
        self._set_stops(slot, state.request.stop_token_ids)
        state.slot = slot

    def leave(self, state: RequestState) -> None:
        """Vacates the slot; the request takes its known tokens along."""
        slot = state.slot
        state.tokens = self.tokens[slot, : self.known[slot]].copy()
        self._occupants[slot] = None
        self.epoch[slot] += 1
        self.decoding[slot] = self.stream[slot] = self.masked[slot] = False
        self.many_stops.pop(slot, None)
        self._free.append(slot)
        state.slot = -1

    def append(self, slots: Slots, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """One sampled token to each slot; returns which of them end with it."""
        position = self.known[slots]
        self.tokens[slots, position] = tokens
        position += 1
        self.known[slots] = position
        ended = (self.stops[slots] == tokens[:, None]).any(1)
        ended |= position >= self.limit[slots]
        if self.many_stops:
            for row, slot in enumerate(slots.tolist()):
                if slot in self.many_stops and int(tokens[row]) in self.many_stops[slot]:
                    ended[row] = True
        return ended

    def _set_stops(self, slot: int, stops: list[int]) -> None:
        self.stops[slot] = -1
        if len(stops) <= STOPS_INLINE:
            self.stops[slot, : len(stops)] = stops
        else:
            self.many_stops[slot] = frozenset(stops)
