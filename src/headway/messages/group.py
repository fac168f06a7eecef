"""How the ranks of one engine reach each other: what an executor tells each of its workers."""

from __future__ import annotations

import msgspec


class RankGroup(msgspec.Struct, frozen=True, kw_only=True):
    """Rank ``rank`` of ``size`` (pipeline_rank, tensor_rank = divmod(rank, tensor_parallel_size)).

    memory: the number, in the worker's process, of an open memfd that all ranks share where they are on one node; they
    give it its size. store: "host:port" of a torch.distributed TCPStore that rank 0 serves, for everything else, under
    keys that begin with ``engine``, a name that no other engine has: two that come to one store never meet.
    """

    rank: int
    size: int
    memory: int | None = None
    store: str
    engine: str
