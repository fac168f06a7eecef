"""Which replica runs a request: the least loaded, or the one that has its prefix."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from headway.messages import Request

CHUNK = 64
"""Tokens of a prefix that is worth knowing; half a millisecond of prefill on a CPU core and up."""
MAX_CHUNKS = 16
KNOWN_PREFIXES = 16384
SLACK = 4


def choose(loads: Mapping[int, int], owner: int | None = None, turn: int = 0) -> int:
    """The owner, if it has at most SLACK requests, or a quarter, more than the least loaded replica; else that one.

    loads: requests by replica, of those that run. owner: the replica that saw the longest prefix. turn: any number,
    another each time; decides between equals.
    """
    least = min(loads.values())
    if owner is not None and owner in loads and loads[owner] <= least + max(SLACK, least // 4):
        return owner
    equals = sorted(replica for replica, load in loads.items() if load == least)
    return equals[turn % len(equals)]


def prefix_keys(tokens: Sequence[int], salt: str = "") -> list[int]:
    """One for each chunk of the prompt's beginning: equal (collisions aside) where all tokens up to its end are."""
    keys: list[int] = []
    for end in range(CHUNK, min(len(tokens), CHUNK * MAX_CHUNKS) + 1, CHUNK):
        keys.append(hash((keys[-1] if keys else salt, array("i", tokens[end - CHUNK : end]).tobytes())))
    return keys


class Router:
    """Remembers which replica saw a prefix last."""

    def __init__(self, prefixes: bool) -> None:
        """prefixes: whether the engines keep them."""
        self._prefixes = prefixes
        self._seen: OrderedDict[int, int] = OrderedDict()
        self._turn = 0

    def route(self, request: Request, loads: Mapping[int, int]) -> int:
        """loads: as for choose()."""
        keys = prefix_keys(request.prompt_token_ids, request.cache_salt) if self._prefixes and len(loads) > 1 else []
        owner = next((self._seen[key] for key in reversed(keys) if key in self._seen), None)
        self._turn += 1
        replica = choose(loads, owner, self._turn)
        for key in keys:
            self._seen[key] = replica
            self._seen.move_to_end(key)
        while len(self._seen) > KNOWN_PREFIXES:
            self._seen.popitem(last=False)
        return replica

    def forget(self, replica: int) -> None:
        """Its cache is gone."""
        for key in [key for key, owner in self._seen.items() if owner == replica]:
            del self._seen[key]
