"""Waiting and waking across processes without polling."""

from __future__ import annotations

from headway import futex


class Bell:
    """A 32-bit word in shared memory that several processes ring and any number wait on.

    Plain stores cannot count rings of several processes, so each ringer writes what nobody else writes: its own number
    (below 1024) beside its own count. To wait without missing a ring: read ``value``, look whether there is anything to
    do, and only then ``wait(value)``, which returns at once if there was a ring in between. ``ring`` always makes the
    system call: to look for waiters first would need a fence, which Python has not.
    """

    def __init__(self, word: memoryview, address: int, ringer: int) -> None:
        """word: the 4 bytes that lie at that address."""
        assert 0 <= ringer < 1024
        self._word, self._address = word.cast("I"), address
        self._ringer, self._count = ringer, 0

    @property
    def value(self) -> int:
        return self._word[0]

    def ring(self) -> None:
        """What was written before is seen by whoever is woken. One thread at a time."""
        self._count = (self._count + 1) & 0x3FFFFF
        self._word[0] = self._count << 10 | self._ringer
        futex.wake(self._address)

    def wait(self, value: int, timeout: float | None = None) -> None:
        """Returns after a ring since ``value`` was read, after timeout seconds, or after a signal; also for nothing."""
        futex.wait(self._address, value, timeout)
