"""Opens what a RankGroup describes: how a worker's tensor parallel ranks add up their partial results."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Generator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from headway.errors import EngineError, PeerLost
from headway.ops.cpu.abi import find_kernels
from headway.ops.cpu.comm import START_TIMEOUT_S, SharedComm

if TYPE_CHECKING:
    from torch import Tensor

    from headway.config.settings import EngineConfig
    from headway.messages import RankGroup

GLOO_TIMEOUT_S = 600.0  # for a peer whose node is gone; a process that ends is seen at once


class GlooComm:
    """A Comm over sockets: for ranks on several nodes, or without the compiled kernels."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._group = open_gloo(store, rank, size)

    def all_reduce(self, x: Tensor) -> None:
        assert x.dtype == torch.float32
        try:
            self._group.allreduce([x]).wait()
        except RuntimeError as error:
            raise PeerLost(f"another tensor parallel rank is gone: {error}") from error

    def close(self) -> None:
        self._group.shutdown()


def open_gloo(store: dist.Store, rank: int, size: int) -> Any:
    """A torch.distributed.ProcessGroupGloo. Raises PeerLost when the other ranks do not come."""
    with _meeting():
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=GLOO_TIMEOUT_S))


def open_comm(config: EngineConfig, rank: int, group: RankGroup | None) -> SharedComm | GlooComm | None:
    """The Comm of this rank's tensor parallel group; None for a group of one.

    Waits for the other ranks: raises EngineError when they do not come, WorkerDied when they end.
    """
    size = config.parallel.tensor_parallel_size
    if size == 1:
        return None
    assert group is not None, "ranks need to be told how they reach each other"
    stage, tensor_rank = divmod(rank, size)
    kernels = find_kernels(config.device.isa) if config.device.ops == "cpu" else None
    if group.memory is not None and kernels is not None:
        store, memory = None, os.dup(group.memory)
    else:
        store = open_store(group, stage)
        memory = (
            None if group.memory is not None else share_memory(store, tensor_rank, size, willing=kernels is not None)
        )
        if memory is None or kernels is None:
            return GlooComm(store, tensor_rank, size)
    return SharedComm(
        kernels,
        config.device.threads,
        memory,
        region=stage,
        rank=tensor_rank,
        size=size,
        first_rank=stage * size,
        store=store,
    )


def open_store(group: RankGroup, part: int | str) -> dist.Store:
    """Keys of one stage, or of something else that some ranks share. Rank 0 serves it for as long as it holds it."""
    host, _, port = group.store.rpartition(":")
    try:
        timeout = timedelta(seconds=START_TIMEOUT_S)
        serves = group.rank == 0
        store = dist.TCPStore(
            host,
            int(port),
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=False,  # which leaves a pipe in the process
        )
    except RuntimeError as error:
        raise EngineError(f"the ranks' store at {group.store} does not answer: {error}") from error
    return dist.PrefixStore(f"headway/{group.engine}/{part}", store)


def share_memory(store: dist.Store, rank: int, size: int, *, willing: bool) -> int | None:
    """A memfd of rank 0 opened on every rank, or None where one of them cannot: it is on another node, say.

    Raises PeerLost when the others do not come.
    """
    memory = None
    with _meeting():
        if rank == 0:
            name = f"headway-{uuid.uuid4().hex}"
            memory = os.memfd_create(name) if willing else None
            store.set("memory", f"{os.getpid()} {memory} {name}")
        elif willing:
            memory = _open_memory(*store.get("memory").decode().split())
        store.set(f"has/{rank}", str(memory is not None))
        everyone = all(store.get(f"has/{other}") == b"True" for other in range(size))
        store.set(f"done/{rank}", "")
        if rank == 0:
            store.wait([f"done/{other}" for other in range(size)])  # the store may end with this process's use of it
    if everyone:
        return memory
    if memory is not None:
        os.close(memory)
    return None


def _open_memory(pid: str, descriptor: str, name: str) -> int | None:
    path = f"/proc/{pid}/fd/{descriptor}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC) if os.readlink(path) == f"/memfd:{name} (deleted)" else None
    except OSError:  # no such process here, or not ours
        return None


@contextlib.contextmanager
def _meeting() -> Generator[None]:
    """Errors of torch's stores and groups are headway's."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"the other ranks did not come: {error}") from error
