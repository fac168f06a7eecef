"""Every exception headway raises on purpose, in one tree.

HeadwayError
├── UserError (also a ValueError)      the caller can mend it: names the field, the value, what is accepted
│   ├── ConfigError                    a setting, or settings that contradict each other
│   ├── RequestError                   one request; costs the others nothing
│   └── ModelError                     a checkpoint, architecture or tokenizer that cannot be used
├── MissingDependencyError (also an ImportError)
├── RowFailed                          a row of a job that stops at the first that fails
└── EngineError                        the engine failed; not the caller's doing
    ├── WorkerError                    an exception on a rank, with its remote traceback
    ├── WorkerDied                     a worker process ended
    ├── PeerLost                       a rank cannot reach another one, which says why itself
    └── EngineDead                     the engine had failed, or was closed, before this call
"""

from __future__ import annotations


class HeadwayError(Exception):
    """Base of everything headway raises on purpose."""


class UserError(HeadwayError, ValueError):
    """Something the caller can mend."""


class FieldError(UserError):
    """A named field has a value that is not accepted."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        super().__init__(f"{field}={_shorten(value)}: {accepted}")
        self.field, self.value, self.accepted = field, value, accepted


class ConfigError(FieldError):
    """A setting, or a combination of settings, that cannot be honoured."""


class RequestError(FieldError):
    """One request that cannot be honoured."""


class ModelError(UserError):
    """A checkpoint, architecture or tokenizer that cannot be used."""


class MissingDependencyError(HeadwayError, ImportError):
    """An optional package is needed; the message says which extra installs it."""


class RowFailed(HeadwayError):
    """A row of a job that stops at the first that fails; the message names it."""


class EngineError(HeadwayError):
    """The engine failed; not the caller's doing."""


class WorkerError(EngineError):
    """An exception on a rank."""

    def __init__(self, rank: int, kind: str, message: str, remote_traceback: str = "") -> None:
        super().__init__(f"rank {rank}: {kind}: {message}")
        self.rank, self.kind, self.message = rank, kind, message
        self.remote_traceback = remote_traceback


class WorkerDied(EngineError):
    """A worker process ended; ``status`` is its exit code, minus the signal's number, or None (not known)."""

    def __init__(self, rank: int, status: int | None = None) -> None:
        super().__init__(f"rank {rank} ended" + (f" with status {status}" if status is not None else ""))
        self.rank, self.status = rank, status


class PeerLost(EngineError):
    """A rank cannot reach another one: a consequence, of which the other one has the cause."""


class EngineDead(EngineError):
    """The engine had failed, or was closed, before this call."""


def _shorten(value: object, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
