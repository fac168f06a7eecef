"""The messages between an engine's process, its clients and whoever started it, in MessagePack with explicit types."""

from __future__ import annotations

from typing import Literal

import msgspec

from headway.config import EngineConfig, ModelFacts
from headway.engine.metrics import EngineMetrics
from headway.executor.channel.wire import Address, Failure
from headway.messages import EngineOutput, Request, WorkerInfo

Method = Literal["sleep", "wake_up", "update_weights"]


class EngineTicket(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a process a replica. tokenizer: path of its files. host: the address of the interface to listen on for
    clients on other nodes; None: they are on this one."""

    replica: int
    config: EngineConfig
    facts: ModelFacts
    tokenizer: str
    host: str | None = None


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The model is loaded; config: with the capacity that was found. address: for clients."""

    address: Address
    config: EngineConfig
    info: WorkerInfo


class Status(msgspec.Struct, array_like=True, frozen=True):
    """Of a replica, from the supervisor to clients. address: where it runs, if it does; why: it does not.

    final: nor will any other.
    """

    replica: int
    address: Address | None
    why: str = ""
    final: bool = False


class Hello(msgspec.Struct, array_like=True, tag=True):
    """A client is there."""


class Submit(msgspec.Struct, array_like=True, tag=True):
    """Their ids are like no other client's."""

    requests: list[Request]


class Abort(msgspec.Struct, array_like=True, tag=True):
    request_ids: list[str]


class Action(msgspec.Struct, array_like=True, tag=True):
    id: int
    method: Method
    args: list[int | str]


class News(msgspec.Struct, array_like=True, tag=True):
    """What a step gave to one client, and how the engine is. taken: how many requests of this client it has seen."""

    outputs: list[EngineOutput]
    failures: list[tuple[str, Failure]]
    taken: int
    metrics: EngineMetrics


class Done(msgspec.Struct, array_like=True, tag=True):
    """An action, or how it failed."""

    id: int
    failure: Failure | None = None


class Dying(msgspec.Struct, array_like=True, tag=True):
    """The engine has failed, and its process ends."""

    why: str


ToEngine = Hello | Submit | Abort | Action
ToClient = News | Done | Dying
ToStarter = Ready | Failure

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_client = msgspec.msgpack.Decoder(ToClient).decode
decode_to_starter = msgspec.msgpack.Decoder(ToStarter).decode
decode_ticket = msgspec.msgpack.Decoder(EngineTicket).decode
decode_status = msgspec.msgpack.Decoder(Status).decode
