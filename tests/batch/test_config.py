"""What a processor's settings may be: what is not accepted is told before anything starts."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from headway.batch import EngineProcessorConfig, HttpRequestProcessorConfig, build_processor
from headway.batch.config import StageConfig
from headway.errors import UserError


def engine(**settings: Any) -> Any:
    return build_processor(EngineProcessorConfig(model_source="m", **settings))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: engine(batchsize=2), "batchsize=2: unknown setting; did you mean batch_size?"),
        (lambda: HttpRequestProcessorConfig(url="", qbs=2), "qbs=2: unknown setting; did you mean qps?"),  # pyright: ignore
        (lambda: StageConfig(cpus=2), "cpus=2: unknown setting; did you mean num_cpus?"),  # pyright: ignore
        (lambda: engine(tokenize_stage={"cpus": 2}), "tokenize_stage.cpus=2: unknown setting; did you mean num_cpus?"),
        (lambda: engine(engine_kwargs={"max_seqs": 2}), "max_seqs=2: unknown setting; did you mean max_num_seqs?"),
        (lambda: engine(engine_kwargs={"tensor_parallel_size": "2"}), "tensor_parallel_size='2': must be an integer"),
        (
            lambda: engine(sampling_params={"max_token": 2}),
            "sampling_params.max_token=2: unknown; did you mean max",
        ),
        (lambda: engine(concurrency=None), "concurrency=None: must be a number of at least 1, or (least, most)"),
    ],
)
def test_what_is_not_accepted_is_named(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value).startswith(told)


def test_a_config_is_a_value() -> None:
    config = EngineProcessorConfig(model_source="m", tokenize_stage={"batch_size": 3})
    assert pickle.loads(pickle.dumps(config)) == config
    assert replace(config, batch_size=5) == EngineProcessorConfig(
        model_source="m", tokenize_stage={"batch_size": 3}, batch_size=5
    )
