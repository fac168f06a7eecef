"""What an engine on Ray reserves, and which executor it has."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray.data")

from headway.batch import EngineProcessorConfig
from headway.batch.ray.resources import engine_resources, engine_settings

NONE = {"num_gpus": None, "memory": None, "resources": None, "accelerator_type": None}


@pytest.mark.parametrize(
    ("settings", "executor"),
    [
        ({}, "uni"),
        ({"tensor_parallel_size": 2}, "ray"),
        ({"pipeline_parallel_size": 2}, "ray"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, "mp"),
    ],
)
def test_more_than_one_rank_takes_ray_unless_told_otherwise(settings: dict[str, Any], executor: str) -> None:
    assert engine_settings(settings, None)["distributed_executor_backend"] == executor


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {"num_cpus": 1.0, **NONE}),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}, {"num_cpus": 2.0, **NONE}),
        ({"tensor_parallel_size": 2}, {"num_cpus": 0}),  # the ranks' group has them
        (
            {"placement_group_config": {"bundle_per_worker": {"CPU": 4, "GPU": 1, "here": 1}}},
            {**NONE, "num_cpus": 4, "num_gpus": 1, "resources": {"here": 1}},
        ),
    ],
)
def test_the_engines_worker_reserves_what_its_ranks_do_not(settings: dict[str, Any], wanted: dict[str, Any]) -> None:
    config = EngineProcessorConfig(model_source="any")
    assert engine_resources(settings, config) == {"runtime_env": None, **wanted}
    assert (
        engine_resources({}, EngineProcessorConfig(model_source="any", accelerator_type="X"))["accelerator_type"] == "X"
    )


def test_an_engine_beyond_the_least_may_wait_for_room_as_long_as_the_job_takes() -> None:
    given = {"tensor_parallel_size": 2}
    assert engine_settings(given, None, scales=True)["placement_group_timeout_s"] >= 10**9
    assert engine_settings({**given, "placement_group_timeout_s": 5}, None, True)["placement_group_timeout_s"] == 5
    assert "placement_group_timeout_s" not in engine_settings(given, None)


def test_an_accelerators_type_is_in_every_bundle() -> None:
    given = {"tensor_parallel_size": 2, "placement_group_config": {"bundle_per_worker": {"GPU": 1}}}
    bundle = {"GPU": 1, "accelerator_type:X": 0.001}
    assert engine_settings(given, "X")["placement_group_config"] == {"bundles": [bundle] * 2, "strategy": "PACK"}
    assert given["placement_group_config"] == {"bundle_per_worker": {"GPU": 1}}
