"""What rows of a dataset may hold and do, through a real Ray: what is wrong with one is its own."""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

from tests.batch.slow_stage import SlowSpec  # noqa: E402

from headway.batch import EngineProcessorConfig, build_processor  # noqa: E402
from headway.batch.config import StageConfig  # noqa: E402
from headway.batch.ray.dataset import apply  # noqa: E402
from headway.batch.specs import FunctionSpec  # noqa: E402
from headway.batch.stages.functions import RowFunction, postprocess, preprocess  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_here")

APART = StageConfig(num_cpus=0.25)


def through(
    dataset: Any, log: Path, before: RowFunction, after: RowFunction | None = None, workers: StageConfig | None = None
) -> Any:
    """A dataset through a processor whose engine only takes its time."""
    config = EngineProcessorConfig(model_source="none", should_continue_on_error=True)
    first = FunctionSpec(
        name="preprocess", load=partial(preprocess, before), about="", workers=workers or StageConfig()
    )
    specs: list[Any] = [first, SlowSpec(slots=8, seconds=0.01, log=str(log))]
    if after is not None:
        specs.append(FunctionSpec(name="postprocess", load=partial(postprocess, after), about=""))
    return apply(dataset, config, specs, {})


def errors(dataset: Any) -> dict[int, tuple[str, str]]:
    """By id: the type of what was raised, and where."""
    return {row["id"]: (row["error"]["type"], row["error"]["stage"]) for row in dataset.take_all() if row["error"]}


def test_a_row_that_cannot_be_stored_fails_alone(tmp_path: Path) -> None:
    strange = {1: object(), 2: {"key": object()}}

    def add(row: dict[str, Any]) -> dict[Any, Any]:
        return {"id": row["id"], "thing": strange.get(row["id"], "a"), **({7: 7} if row["id"] == 3 else {})}

    found = through(ray.data.range(5), tmp_path / "log", lambda row: {}, add)
    assert errors(found) == dict.fromkeys((1, 2, 3), ("TypeError", "output"))


def test_a_row_that_cannot_go_to_the_next_worker_fails_alone(tmp_path: Path) -> None:
    def open_file(row: dict[str, Any]) -> dict[str, Any]:
        return {"file": sys.stdout if row["id"] == 1 else None}

    found = through(ray.data.range(3), tmp_path / "log", open_file, lambda row: {"id": row["id"]}, APART)
    assert errors(found) == {1: ("TypeError", "output")}


def test_a_function_that_would_end_the_process_fails_its_row(tmp_path: Path) -> None:
    def leave(row: dict[str, Any]) -> dict[str, Any]:
        return sys.exit(3) if row["id"] == 1 else {}

    assert errors(through(ray.data.range(3), tmp_path / "log", leave)) == {1: ("SystemExit", "preprocess")}


def test_columns_that_no_stage_touched_are_what_they_were_behind_workers_apart(tmp_path: Path) -> None:
    image = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    rows = ray.data.from_items([{"id": i, "image": image, "list": [i], "gone": 1} for i in range(2)])

    def change(row: dict[str, Any]) -> dict[str, Any]:
        del row["gone"]
        row["list"].append(7)
        return {"half": row["image"][0] / 2}

    found = sorted(through(rows, tmp_path / "log", change, None, APART).take_all(), key=lambda row: row["id"])
    assert all((row["image"] == image).all() and row["image"].dtype == np.uint8 for row in found)
    assert [row["half"].tolist() for row in found] == [(image[0] / 2).tolist()] * 2
    assert [(row["list"], "gone" in row) for row in found] == [([0, 7], False), ([1, 7], False)]


def test_columns_come_back_from_a_shared_engine_as_they_went() -> None:
    image = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    config = EngineProcessorConfig(
        model_source="smollm2-135m-instruct",
        engine_kwargs={"max_num_seqs": 8, "max_model_len": 256, "threads": 1},
        shared="images",
        sampling_params={"max_tokens": 2},
        should_continue_on_error=True,
    )
    prompts = ["One, two,", "\ud83d"]  # a text that cannot be encoded costs its row alone
    with build_processor(config, lambda row: {"prompt": prompts[row["id"]]}, lambda row: {**row, "prompt": 0}) as one:
        found = one(ray.data.from_items([{"id": i, "image": image} for i in range(2)])).take_all()
    good, bad = sorted(found, key=lambda row: row["id"])
    assert good["error"] is None and good["num_generated_tokens"] == 2
    assert "valid Unicode" in bad["error"]["message"] and bad["error"]["stage"] == "engine"
    assert all((row["image"] == image).all() and row["image"].dtype == np.uint8 for row in (good, bad))


@pytest.mark.long
def test_rows_that_always_kill_their_worker_end_the_job(tmp_path: Path) -> None:
    with pytest.raises(ray.exceptions.RayError):
        through(
            ray.data.range(3), tmp_path / "log", lambda row: {"": os.kill(os.getpid(), signal.SIGKILL)}
        ).materialize()
