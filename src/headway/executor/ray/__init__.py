"""The executor whose workers are Ray actors. Its modules import ray: they are imported where the executor is made."""

from __future__ import annotations

from headway.config import EngineConfig
from headway.errors import MissingDependencyError
from headway.executor.launcher import WORKER
from headway.executor.remote import RemoteExecutor

__all__ = ["RayExecutor"]


class RayExecutor(RemoteExecutor):
    """See ``headway.executor.port.Executor``. Raises MissingDependencyError without Ray."""

    def __init__(self, config: EngineConfig, worker: str = WORKER) -> None:
        try:
            from headway.executor.ray.launcher import RayLauncher
        except ImportError as error:
            raise MissingDependencyError("the ray executor needs Ray: pip install 'headway[ray]'") from error
        super().__init__(config, RayLauncher(config), worker)
