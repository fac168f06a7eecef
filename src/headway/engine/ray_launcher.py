"""Replicas as Ray actors: each in a placement group of its own, on the nodes that were asked for."""

from __future__ import annotations

import asyncio
import secrets
import socket
import threading
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import ray
from ray.exceptions import RayError, RayTaskError

from headway.config import ParallelConfig, RayConfig
from headway.engine.process import EngineService
from headway.engine.supervise import Ended, Tell
from headway.engine.wire import EngineTicket, Ready, decode_ticket, decode_to_starter, encode
from headway.errors import ConfigError, EngineDead
from headway.executor.channel.wire import Failure
from headway.executor.failure import failure_of
from headway.executor.ray.actor import settle
from headway.executor.ray.cluster import connection
from headway.executor.ray.launcher import actor_on
from headway.executor.ray.placement import Group, live_nodes, name_of


class ReplicaActor:
    """stop() and run() on a thread each."""

    def run(self, ticket: bytes) -> Generator[bytes]:
        """Ready, and what the engine failed of, if it did."""
        decoded = decode_ticket(ticket)
        settle(decoded.config.device.threads)
        self._service = EngineService(decoded)
        try:
            yield encode(self._service.load())
            error: BaseException | None = self._service.run()
        except Exception as failed:
            error = failed
        if error is not None:
            yield encode(failure_of(error))

    def stop(self) -> None:
        self._service.stop()


class RayRun:
    """See ``headway.engine.supervise.Run``. On a thread of its own, which waits for Ray."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ticket: EngineTicket, tell: Tell) -> None:
        self.ended = asyncio.Event()
        self._loop, self._ticket, self._tell = loop, ticket, tell
        self._gate = threading.Lock()  # between the group's making and kill()
        self._group: Group | None = None
        self._actor: Any = None  # once it is ready
        self._killed = False
        name = f"headway-dp{ticket.replica}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        actor = self._actor
        if actor is None:
            self.kill()
        else:
            actor.stop.remote()

    def kill(self) -> None:
        """Ray ends whatever is in a group that is no more, and whoever waits for it."""
        with self._gate:
            self._killed = True
            if self._group is not None:
                self._group.remove()

    def _run(self) -> None:
        config = self._ticket.config
        cpus = config.parallel.data_parallel_size * sum(bundle.get("CPU", 0) for bundle in config.ray.bundles)
        why, failure = "its actor has ended", None
        try:
            opened = connection.open(config.ray.address, cpus)
            try:
                failure = self._host()
            finally:
                if opened:
                    connection.close()
        except RayTaskError as error:
            failure = failure_of(error.cause)
        except RayError as error:
            why += f": {str(error).splitlines()[-1]}"
        except (Exception, SystemExit) as error:  # SystemExit: somebody else closed the connection to Ray
            failure = failure_of(error)
        self._tell(Ended(why if failure is None else failure.message, failure))
        with suppress(RuntimeError):  # the supervisor has ended
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._thread.join()
        self.ended.set()

    def _host(self) -> Failure | None:
        """What the engine failed of, if it told that."""
        replica, parallel = self._ticket.replica, self._ticket.config.parallel
        config = replace(self._ticket.config.ray, node=_where(replica, parallel))
        with self._gate:
            if self._killed:
                raise EngineDead("it was closed")
            self._group = Group(config, f"replica {replica}", join=False)
        try:
            return self._serve(self._group, config, replica)
        finally:
            with self._gate:
                self._group.remove()
                self._group = self._actor = None

    def _serve(self, group: Group, config: RayConfig, replica: int) -> Failure | None:
        seat = group.wait()[0]
        if self._ticket.config.parallel.executor == "ray":
            seat = replace(seat, resources={})  # they are the ranks'
        actor = actor_on(group, seat, ReplicaActor, f"headway-{secrets.token_hex(4)}-dp{replica}", concurrency=2)
        here = seat.node == ray.get_runtime_context().get_node_id()
        host = None if here else live_nodes()[seat.node]["NodeManagerAddress"]
        ticket = encode(msgspec.structs.replace(self._ticket, host=host))
        failure = None
        for told in actor.run.remote(ticket):
            message = decode_to_starter(ray.get(told))
            if isinstance(message, Ready):
                self._actor = actor
                self._tell(message)
            else:
                failure = message
        return failure


def _where(replica: int, parallel: ParallelConfig) -> str:
    """RayConfig.node."""
    local = parallel.data_parallel_size_local
    if local is None:
        return ""
    head = node_of(parallel.data_parallel_address)
    return head if replica < local else f"!{head}"


def node_of(address: str | None) -> str:
    """The ID of the node with this name or address; None: this one's. Raises ConfigError."""
    here, nodes = ray.get_runtime_context().get_node_id(), live_nodes()
    if address is None:
        return here
    found: set[str] = set()
    with suppress(OSError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(address, None)}
    matching = [n for n, node in nodes.items() if node["NodeManagerAddress"] in found]
    matching = matching or [n for n, node in nodes.items() if node["NodeManagerHostname"] == address]
    if here in matching or (not matching and any(map(_is_of_this_machine, found))):
        return here
    if not matching:
        names = ", ".join(f"{name_of(node)} {node['NodeManagerHostname']}" for node in nodes.values())
        raise ConfigError("data_parallel_address", address, f"is no node of the cluster, which has {names}")
    return matching[0]


def _is_of_this_machine(address: str) -> bool:
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return False
    return True
