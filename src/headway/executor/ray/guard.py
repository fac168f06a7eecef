"""A placement group that ends with the process it is for, however that ends.

Ray gives a group back with the program that made it, even where an actor made it that died long before; but a group
that a *detached* actor made goes with that actor. So one makes it, on the engine's node, and exits with its process.
"""

from __future__ import annotations

import os
import secrets
import select
from typing import Any

import ray
from ray.actor import exit_actor
from ray.util import placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headway.config import RayConfig


class Guard:
    """The actor. engine: a process of this node."""

    def __init__(self, config: RayConfig, engine: int) -> None:
        self._engine = os.pidfd_open(engine)  # raises, and so ends this actor, where it is gone already
        ray.get_runtime_context().current_actor.watch.remote()
        self._group = new_group(config)

    def group(self) -> PlacementGroup:
        return self._group

    def watch(self) -> None:
        """Runs beside the others."""
        ended = select.poll()
        ended.register(self._engine, select.POLLIN)
        ended.poll()
        exit_actor()


def new_group(config: RayConfig) -> PlacementGroup:
    where = [{"ray.io/node-id": config.node} if config.node else {} for _ in config.bundles]
    return placement_group(list(config.bundles), strategy=config.strategy, bundle_label_selector=where)


def guarded_group(config: RayConfig) -> tuple[PlacementGroup, Any]:
    """A group for the engine of this process, which is a Ray actor's, and the guard, whose end gives it back."""
    here = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {
        "name": f"headway-guard-{secrets.token_hex(4)}",
        "namespace": "headway",
        "lifetime": "detached",
        "num_cpus": 0,
        "max_concurrency": 2,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False),
    }
    guard: Any = ray.remote(Guard).options(**options).remote(config, os.getpid())
    return ray.get(guard.group.remote()), guard
