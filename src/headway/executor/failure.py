"""How an exception crosses from one process to another."""

from __future__ import annotations

import traceback

from headway import errors
from headway.errors import FieldError, HeadwayError, PeerLost, WorkerDied, WorkerError
from headway.executor.channel.wire import Failure


def failure_of(error: BaseException, call: int | None = None) -> Failure:
    """What the process of the exception tells. call: which one raised it."""
    if isinstance(error, WorkerError):
        return Failure(error.kind, error.message, error.remote_traceback, call)
    field = None
    if isinstance(error, FieldError):
        value = error.value if isinstance(error.value, (str, int, float)) else repr(error.value)
        field = (error.field, value, error.accepted)
    lost = error.rank if isinstance(error, WorkerDied) else -1 if isinstance(error, PeerLost) else None
    text = "".join(traceback.format_exception(error))
    return Failure(type(error).__name__, str(error), text, call, field, lost)


def error_of(rank: int, failure: Failure, own: bool = True) -> HeadwayError:
    """The exception as the caller gets it. own: one of headway's is itself again (what is wrong with a model)."""
    kind = getattr(errors, failure.kind, None) if own else None
    if failure.field is not None and kind in (errors.ConfigError, errors.RequestError):
        return kind(*failure.field)
    more_than_text = (FieldError, WorkerError, WorkerDied)
    if isinstance(kind, type) and issubclass(kind, HeadwayError) and not issubclass(kind, more_than_text):
        return kind(failure.message)
    return WorkerError(rank, failure.kind, failure.message, failure.remote_traceback)
