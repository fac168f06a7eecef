"""The messages between an engine and its workers, in MessagePack with explicit types."""

from __future__ import annotations

from typing import Any

import msgspec

from headway.messages import StepPlan, StepResult, WorkerInfo


class Masks(msgspec.Struct, array_like=True, tag=True):
    """Token masks for a plan's masked slots; see Executor.mask."""

    step: int
    masks: dict[int, bytes]


class Call(msgspec.Struct, array_like=True, tag=True):
    """Run a method of the worker between steps."""

    id: int
    method: str
    args: list[Any]


class Close(msgspec.Struct, array_like=True, tag=True):
    """The last message: the worker ends."""


class Ready(msgspec.Struct, array_like=True, tag=True):
    """The rank's model is loaded."""

    info: WorkerInfo


class CallResult(msgspec.Struct, array_like=True, tag=True):
    id: int
    value: Any


class Failure(msgspec.Struct, array_like=True, tag=True):
    """An exception on the rank: of call ``id``, or of loading or a step, which end the worker.

    field: (name, value, what is accepted) of headway's FieldErrors. lost: the exception only says that another rank is
    gone: which one, or -1.
    """

    kind: str
    message: str
    remote_traceback: str
    id: int | None = None
    field: tuple[str, Any, str] | None = None
    lost: int | None = None


class Address(msgspec.Struct, frozen=True, array_like=True):
    """For workers on other nodes: where the engine listens, its public key, and the key pair that it lets in."""

    endpoint: str
    server_key: bytes
    public_key: bytes
    secret_key: bytes


ToWorker = StepPlan | Masks | Call | Close
ToEngine = Ready | StepResult | CallResult | Failure

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
