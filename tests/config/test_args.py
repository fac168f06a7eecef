from __future__ import annotations

from typing import Any

import pytest

from headway.config import EngineArgs
from headway.errors import ConfigError


def test_only_the_model_is_needed() -> None:
    args = EngineArgs.from_kwargs(model="m")
    assert args.model == "m"
    assert args.max_num_seqs is None


def test_an_unknown_setting_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"max_num_seq=8: unknown setting; did you mean max_num_seqs\?"):
        EngineArgs.from_kwargs(model="m", max_num_seq=8)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("dtype", "fp8", "must be one of bfloat16, float16, float32"),
        ("quantization", "int3", "must be one of int8"),
        ("threads", 0, "must be at least 1"),
        ("threads", True, "must be an integer"),
        ("max_model_len", "8k", "must be an integer"),
        ("gpu_memory_utilization", 1.5, "must be at most 1.0"),
        ("enforce_eager", 1, "must be true or false"),
        ("tensor_parallel_size", None, "must be an integer"),
        ("placement_group_config", [{"CPU": 1}], "must be a mapping"),
    ],
)
def test_a_bad_value_names_the_field_and_what_is_accepted(name: str, value: Any, accepted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineArgs.from_kwargs(model="m", **{name: value})
    assert (caught.value.field, caught.value.value, caught.value.accepted) == (name, value, accepted)
