"""What an engine on Ray reserves: its worker's CPUs and GPUs, or the bundles of its placement group."""

from __future__ import annotations

from collections import Counter
from typing import Any

from headway.batch.config import EngineProcessorConfig
from headway.config.placement import parse_placement

_A_LITTLE = 0.001
"""Of an accelerator's type, which Ray counts as a resource of one a node."""
_ANY_TIME_S = 1e9


def engine_settings(settings: dict[str, Any], accelerator_type: str | None, scales: bool = False) -> dict[str, Any]:
    """With the executor decided: ``uni`` for one rank, ``ray`` for more, unless it is given.

    scales: an engine for which there is no room may wait as long as the others take, and is no error.
    """
    settings = {"distributed_executor_backend": "uni" if _ranks(settings) == 1 else "ray", **settings}
    if settings["distributed_executor_backend"] != "ray":  # the worker takes what the bundles would
        settings.pop("placement_group_config", None)
        return settings
    if scales:
        settings.setdefault("placement_group_timeout_s", _ANY_TIME_S)
    if accelerator_type is not None:
        bundles, strategy = _bundles(settings)
        typed = [{**bundle, f"accelerator_type:{accelerator_type}": _A_LITTLE} for bundle in bundles]
        settings["placement_group_config"] = {"bundles": typed, "strategy": strategy}
    return settings


def engine_resources(settings: dict[str, Any], config: EngineProcessorConfig) -> dict[str, Any]:
    """Ray's options for the actor that the engine runs in."""
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": config.runtime_env}
    if engine_settings(settings, None)["distributed_executor_backend"] == "ray":
        return options
    total = Counter[str]()
    for bundle in _bundles(settings)[0]:
        total.update(bundle)
    options["num_cpus"] = total.pop("CPU", 0)
    options |= {"num_gpus": total.pop("GPU", None), "memory": total.pop("memory", None)}
    return {**options, "resources": dict(total) or None, "accelerator_type": config.accelerator_type}


def _ranks(settings: dict[str, Any]) -> int:
    return settings.get("tensor_parallel_size", 1) * settings.get("pipeline_parallel_size", 1)


def _bundles(settings: dict[str, Any]) -> Any:
    return parse_placement(settings.get("placement_group_config") or {}, _ranks(settings), {"CPU": 1.0})
