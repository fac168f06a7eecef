"""Where the model step runs: one contract (port.py), several implementations, chosen by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from headway.config import EngineConfig
from headway.errors import ConfigError
from headway.executor.port import Executor, WorkerInfo

__all__ = ["Executor", "WorkerInfo", "executor_of", "make_executor"]

_NAMES = {
    "uni": "headway.executor.uni:UniExecutor",
    "mp": "headway.executor.mp:MpExecutor",
    "external_launcher": "headway.executor.external:ExternalExecutor",
    "ray": "headway.executor.ray:RayExecutor",
    "fake": "headway.executor.fake:FakeExecutor",
}
_METHODS = ("start", "submit", "mask", "call", "health", "close")


def make_executor(config: EngineConfig) -> Executor:
    """The executor that ``parallel.executor`` names."""
    return executor_of(config.parallel.executor)(config)


def executor_of(name: str) -> Callable[[EngineConfig], Executor]:
    """One of _NAMES or an import path "module:Class", imported. Raises ConfigError."""
    module, _, attribute = _NAMES.get(name, name).partition(":")
    if not attribute:
        accepted = f"must be one of {', '.join(_NAMES)} or an import path module:Class"
        raise ConfigError("distributed_executor_backend", name, accepted)
    try:
        factory = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if name in _NAMES:
            raise
        raise ConfigError("distributed_executor_backend", name, f"cannot be imported ({error})") from error
    lacking = [method for method in _METHODS if not hasattr(factory, method)]
    if lacking:
        accepted = f"is no executor (see headway.executor.port): it has no {', '.join(lacking)}"
        raise ConfigError("distributed_executor_backend", name, accepted)
    return factory
