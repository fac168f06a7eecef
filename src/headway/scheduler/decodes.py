"""The slots that decode, and whose turn it is.

A pipeline of P stages runs P steps at once, and a slot's next step starts when the last one's token is back at the
first stage. So a step runs one in P of the decodes, those that have waited longest, and a slot's turn comes again P
steps later: groups form by themselves, stay of equal size as requests come and go, and repeat while none does.

            step    0   1   2   3   4                    step    0   1   2   3
    stage 0         A   B   A   B   A    one request     A at 0, at 1 (waits for the token of 0), ...
    stage 1             A   B   A   B
"""

from __future__ import annotations

import numpy as np

from headway.scheduler.slots import Slots, SlotTable


class Decodes:
    """depth: how many tokens of a slot may be unknown when its next is planned."""

    def __init__(self, slots: SlotTable, stages: int, depth: int) -> None:
        self._slots, self._stages, self._depth = slots, stages, depth
        self._all: Slots = np.empty(0, np.int64)
        self._stale = False
        self._due = np.zeros(slots.known.size, np.int64)  # the step in which a slot's turn comes again

    def all(self) -> Slots:
        """In the order in which they joined."""
        if self._stale:
            self._all = self._all[self._slots.decoding[self._all]]
            self._stale = False
        return self._all

    def turn(self, step: int, *, early: bool = False) -> Slots:
        """Those that run in a step; early: also before their turn, for when nothing else can run."""
        decodes = self.all()
        if self._stages == 1:
            return decodes
        unknown = self._slots.computed[decodes] + 1 - self._slots.known[decodes]
        due = self._due[decodes]
        may_run = unknown <= self._depth
        if not early:
            may_run &= (due <= step) | (unknown == 0)
        rows = np.flatnonzero(may_run)
        share = -(-decodes.size // self._stages)
        if rows.size > share:
            rows = np.sort(rows[np.argsort(due[rows], kind="stable")[:share]])
        return decodes[rows]

    def join(self, slots: list[int], step: int) -> None:
        """Slots whose first token is sampled in this step."""
        self._all = np.concatenate((self._all, np.array(slots, np.int64)))
        self._due[slots] = step + self._stages

    def ran(self, slots: Slots, step: int) -> None:
        self._due[slots] = step + self._stages

    def left(self) -> None:
        """Some slots no longer decode."""
        self._stale = True
