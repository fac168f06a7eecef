"""The executor whose workers are Ray actors. Its modules import ray: they are imported where the executor is made."""

from __future__ import annotations

from importlib.util import find_spec

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
            raise MissingDependencyError(_missing()) from error
        super().__init__(config, RayLauncher(config), worker)


def _missing() -> str:
    found = find_spec("ray")
    if found is not None and found.submodule_search_locations is None:
        return f"the ray executor needs Ray, but {found.origin} hides it: rename that file"
    return "the ray executor needs Ray: pip install 'headway[ray]'"
