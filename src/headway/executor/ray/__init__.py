"""The executor whose workers are Ray actors. Its modules import ray: they are imported where the executor is made."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec

from headway.config import EngineConfig
from headway.errors import MissingDependencyError
from headway.executor.launcher import WORKER
from headway.executor.remote import RemoteExecutor

__all__ = ["RayExecutor", "needs_ray"]


class RayExecutor(RemoteExecutor):
    """See ``headway.executor.port.Executor``. Raises MissingDependencyError without Ray."""

    def __init__(self, config: EngineConfig, worker: str = WORKER) -> None:
        with needs_ray("the ray executor"):
            from headway.executor.ray.launcher import RayLauncher
        super().__init__(config, RayLauncher(config), worker)


@contextmanager
def needs_ray(what: str) -> Generator[None]:
    """Around the import of what needs it. Raises MissingDependencyError."""
    try:
        yield
    except ImportError as error:
        found = find_spec("ray")
        remedy = ": pip install 'headway[ray]'"
        if found is not None and found.submodule_search_locations is None:
            remedy = f", but {found.origin} hides it: rename that file"
        raise MissingDependencyError(f"{what} needs Ray{remedy}") from error
