"""Where the ranks go: one placement group an engine, its own or the one around it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import get_current_placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from headway.config import RayConfig
from headway.errors import EngineError
from headway.executor.ray.guard import guarded_group, new_group

_log = logging.getLogger("headway")
_SILENT_S = 5.0


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's place: a bundle of the group, its node's id, and the resources the rank takes of it."""

    bundle: int
    node: str
    resources: Mapping[str, float]


class Group:
    """The placement group of one engine: given back with remove(), else when its program or its Ray actor ends."""

    def __init__(self, config: RayConfig, owner: str = "this engine", join: bool = True) -> None:
        """Finds room in the group around this process (join), or asks for a group of its own; wait() comes next."""
        self._config, self._owner = config, owner
        around = get_current_placement_group() if join else None
        bundles = None if around is None else _fit(config, around)
        self._own = bundles is None
        self._guard = None
        if around is None or bundles is None:
            around, bundles = self._make(), range(len(config.bundles))
        self.handle, self._bundles = around, list(bundles)

    def wait(self) -> list[Seat]:
        """The seats, in the order of the bundles. Raises EngineError when the time is over."""
        timeout = self._config.timeout_s
        if not self.handle.wait(min(timeout, _SILENT_S)):
            if timeout > _SILENT_S:
                what = _lacking(self._config)
                _log.warning("%s waits up to placement_group_timeout_s=%g for Ray: %s", self._owner, timeout, what)
            if not self.handle.wait(max(timeout - _SILENT_S, 0)):
                had = f"Ray had no room for {self._owner} within placement_group_timeout_s={timeout:g}"
                raise EngineError(f"{had}: {_lacking(self._config)}")
        nodes = placement_group_table(self.handle)["bundles_to_node_id"]
        return [Seat(i, nodes[i], wanted) for i, wanted in zip(self._bundles, self._config.bundles)]

    def remove(self) -> None:
        """Gives back what __init__ asked for; returns when Ray has it. Idempotent."""
        if self._own and ray.is_initialized():
            remove_placement_group(self.handle)
            if self._guard is not None:
                ray.kill(self._guard)

    def _make(self) -> PlacementGroup:
        config = self._config
        if ray.get_runtime_context().get_actor_id() is None:
            return new_group(config)
        group, self._guard = guarded_group(config)
        return group


def in_rank_order(seats: list[Seat], here: str, tensor_parallel_size: int) -> list[Seat]:
    """Node by node, the engine's (``here``) first; the tensor ranks of a stage share a node where one has the room."""
    nodes: dict[str, list[Seat]] = {}
    for seat in sorted(seats, key=lambda seat: seat.node != here):
        nodes.setdefault(seat.node, []).append(seat)
    ordered: list[Seat] = []
    while left := [seat for of_node in nodes.values() for seat in of_node]:
        roomy = next((of_node for of_node in nodes.values() if len(of_node) >= tensor_parallel_size), left)
        stage = roomy[:tensor_parallel_size]
        ordered += stage
        nodes = {node: [seat for seat in of_node if seat not in stage] for node, of_node in nodes.items()}
    return ordered


def _fit(config: RayConfig, group: PlacementGroup) -> list[int] | None:
    """For each rank a bundle of the group that has room for it; None where they do not all fit."""
    available, name = ray.available_resources(), group.id.hex()
    room = [
        {resource: available.get(f"{resource}_group_{i}_{name}", 0.0) for resource in bundle}
        for i, bundle in enumerate(group.bundle_specs)
    ]
    bundles: list[int] = []
    for wanted in config.bundles:
        fits = (i for i, free in enumerate(room) if all(free.get(r, 0) >= amount for r, amount in wanted.items()))
        if (bundle := next(fits, None)) is None:
            return None
        bundles.append(bundle)
        for resource, amount in wanted.items():
            room[bundle][resource] -= amount
    return bundles


def _lacking(config: RayConfig) -> str:
    """What was asked for, what each node has and what is free."""
    names = sorted({name for bundle in config.bundles for name in bundle})
    free = ray.available_resources()
    nodes = [f"{name_of(node)}: {_amounts(names, node['Resources'])}" for node in live_nodes().values()]
    asked = ", ".join(_amounts(sorted(bundle), bundle) for bundle in config.bundles)
    if config.node:
        asked += f" {'not ' if config.node[0] == '!' else ''}on node {config.node.lstrip('!')[:8]}"
    return (
        f"asked for {len(config.bundles)} bundle(s), {config.strategy}: {asked}; the cluster has {'; '.join(nodes)}; "
        f"free now, in all: {_amounts(names, free)}"
    )


def live_nodes() -> dict[str, dict[str, Any]]:
    """What Ray says of each, by ID."""
    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}


def name_of(node: Mapping[str, Any]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def _amounts(names: list[str], resources: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {resources.get(name, 0):g}" for name in names) + "}"
