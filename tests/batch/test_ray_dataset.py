"""Processors on Ray datasets: a real Ray, real engines."""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

from ray.util import placement_group_table  # noqa: E402
from tests.batch.processors import FAKE, SMALL, processor  # noqa: E402
from tests.batch.slow_stage import SlowSpec, fullness  # noqa: E402

from headway.batch import EngineProcessorConfig, Processor  # noqa: E402
from headway.batch.ray.dataset import apply  # noqa: E402
from headway.batch.specs import FunctionSpec  # noqa: E402
from headway.batch.stages.functions import preprocess  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_here")


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"Name {row['n']} animals"}]}


def keep(row: dict[str, Any]) -> dict[str, Any]:
    return {"id": row["id"], "text": row["generated_text"], "tokens": row["generated_tokens"]}


def numbers(count: int, blocks: int = 4) -> Any:
    return ray.data.from_items([{"id": i, "n": i % 7 + 2} for i in range(count)], override_num_blocks=blocks)


def rows_of(dataset: Any, by: str = "id") -> list[dict[str, Any]]:
    return sorted(dataset.take_all(), key=lambda row: row[by])


def here(one: Processor, count: int, folder: Path) -> list[dict[str, Any]]:
    """What the local runner makes of the rows of numbers(), each with all columns, as a dataset has them."""
    with one:
        one.run(({"id": i, "n": i % 7 + 2} for i in range(count)), folder / "here.jsonl")
    rows = [json.loads(line) for line in (folder / "here.jsonl").read_text().splitlines()]
    columns = {name for row in rows for name in row}
    return [{name: row.get(name) for name in columns} for row in rows]


def groups() -> list[str]:
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


def wait_until(state: Callable[[], Any], wanted: object) -> None:
    """Ray gives back in its own time."""
    deadline = time.monotonic() + 10
    while (now := state()) != wanted:
        assert time.monotonic() < deadline, now
        time.sleep(0.02)


def test_rows_are_those_of_the_local_runner(tmp_path: Path) -> None:
    def bad(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 5:
            raise KeyError("nothing to ask")
        return ask(row)

    one = processor(bad, keep, should_continue_on_error=True)
    found = rows_of(one(numbers(20)))
    assert found == here(one, 20, tmp_path)
    assert found[5]["error"] == {"type": "KeyError", "message": "'nothing to ask'", "stage": "preprocess"}


def test_columns_keep_their_types() -> None:
    table = pa.table(
        {
            "id": pa.array([0, 1], pa.int32()),
            "vector": pa.array([[0.5, 0.25], None], pa.list_(pa.float32())),
            "when": pa.array([0, 1], pa.timestamp("ms")),
            "none": pa.array([None, None], pa.string()),
            "prompt": ["One, two,", "x " * 400],
            "sampling_params": [{"max_tokens": 3, "seed": None}, {"max_tokens": None, "seed": 2}],
        }
    )
    found = processor(engine_kwargs=FAKE, should_continue_on_error=True)(ray.data.from_arrow(table)).materialize()
    schema = dict(zip(found.schema().names, found.schema().types))
    for name in ("id", "vector", "when", "none"):
        assert schema[name] == table.schema.field(name).type
    assert schema["num_generated_tokens"] == pa.int64() and schema["generated_tokens"] == pa.list_(pa.int64())
    assert schema["error"] == pa.struct({"type": pa.string(), "message": pa.string(), "stage": pa.string()})
    first, second = rows_of(found)
    assert first["error"] is None and first["num_generated_tokens"] == 3
    assert second["error"]["type"] == "RequestError" and second["generated_text"] is None


def test_embeddings_are_arrays_and_arrays_come_out_as_they_went_in(minilm_dir: Path) -> None:
    settings: dict[str, Any] = {"model_source": str(minilm_dir), "engine_kwargs": {"threads": 1}, "task_type": "embed"}
    image = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    dataset = ray.data.from_items([{"image": image, "prompt": f"number {i}"} for i in range(4)])
    found = processor(sampling_params={}, **settings)(dataset).materialize()
    schema = dict(zip(found.schema().names, found.schema().types))
    assert schema["embeddings"] == pa.list_(pa.float32()) and "error" not in schema
    for row in found.take_all():
        assert len(row["embeddings"]) == 384
        assert row["image"].dtype == np.uint8 and (row["image"] == image).all()


@pytest.mark.parametrize(("blocks", "with_preprocess"), [(200, True), (1, False)])
def test_the_engine_is_full_whatever_the_blocks(blocks: int, with_preprocess: bool, tmp_path: Path) -> None:
    slots, seconds, log = 64, 0.1, tmp_path / "log"
    config = EngineProcessorConfig(model_source="none", engine_kwargs={"max_num_seqs": slots}, batch_size=7)
    specs: list[Any] = [SlowSpec(slots=slots, seconds=seconds, log=str(log))]
    if with_preprocess:
        specs.insert(
            0, FunctionSpec(name="preprocess", load=partial(preprocess, lambda row: {"m": -row["n"]}), about="")
        )
    found = apply(numbers(2000, blocks), config, specs, {})
    assert [row["id"] for row in rows_of(found)] == list(range(2000))
    assert fullness(log, slots, seconds) >= 0.95


def test_stages_with_workers_of_their_own_get_batches_of_their_size(tmp_path: Path) -> None:
    own = {"batch_size": 5, "concurrency": 1, "num_cpus": 0.5}

    def sizes(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "text": row["generated_text"], "prompt": row["prompt"]}

    stages = {"chat_template_stage": own, "detokenize_stage": {"batch_size": 3, "num_cpus": 0.25}}
    one = processor(ask, sizes, engine_kwargs=FAKE, **stages)
    found = one(numbers(10, blocks=1)).materialize()
    assert rows_of(found) == here(processor(ask, sizes, engine_kwargs=FAKE), 10, tmp_path)
    assert "MapBatches(FunctionWorker)" in found.stats() and "MapBatches(FlowWorker)" in found.stats()


def test_an_engines_worker_reserves_what_its_bundle_says() -> None:
    def assigned(_: dict[str, Any]) -> dict[str, Any]:
        return {"cpus": ray.get_runtime_context().get_assigned_resources()["CPU"]}

    one = processor(ask, assigned, engine_kwargs=FAKE, placement_group_config={"bundle_per_worker": {"CPU": 2}})
    assert one(numbers(1)).take_all() == [{"cpus": 2.0}]


def test_a_failed_row_passes_through_later_processors() -> None:
    def bad(row: dict[str, Any]) -> dict[str, Any]:
        return ask(row) if row["id"] else {}

    def again(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": None, "prompt": row["text"]}

    first = processor(bad, keep, engine_kwargs=FAKE, should_continue_on_error=True)
    second = processor(again, keep, engine_kwargs=FAKE, should_continue_on_error=True)
    found = rows_of(second(first(numbers(4))))
    assert found[0]["error"]["stage"] == "engine" and found[0]["n"] == 2
    assert all(row["error"] is None and row["text"] for row in found[1:])


WHOLE: dict[str, Any] = {**SMALL, "dtype": "float32"}  # in which two ranks give the same tokens as one
SPLIT = {**WHOLE, "tensor_parallel_size": 2}


def test_a_row_that_fails_ends_the_job_where_that_is_asked_for_and_leaves_its_cpu_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bad(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": 7} if row["id"] == 3 else ask(row)

    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps the exceptions of records
    gc.disable()  # that it comes at the right time is luck
    try:
        with pytest.raises(Exception, match=r"RowFailed.*'id': 3"):
            processor(bad, keep, engine_kwargs=FAKE)(numbers(8)).materialize()
        assert len(rows_of(processor(ask, keep, engine_kwargs=SPLIT)(numbers(2)))) == 2
    finally:
        gc.enable()


def test_an_engine_of_two_ranks_has_one_group_that_ends_with_the_dataset(tmp_path: Path) -> None:
    """All CPUs there are, which the processor of the next test needs as well."""

    def count(row: dict[str, Any]) -> dict[str, Any]:
        return {**keep(row), "groups": len([g for g in placement_group_table().values() if g["state"] == "CREATED"])}

    found = rows_of(processor(ask, count, engine_kwargs=SPLIT)(numbers(6)))
    assert {row.pop("groups") for row in found} == {1}
    assert found == here(processor(ask, keep, engine_kwargs=WHOLE), 6, tmp_path)
    wait_until(groups, [])


@pytest.mark.parametrize("how", ["a row fails", "the worker is killed"])
def test_a_group_ends_also_when_the_worker_is_killed(how: str, tmp_path: Path) -> None:
    flag = tmp_path / "killed"

    def harm(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == 3 and not flag.exists():
            flag.touch()
            if how == "a row fails":
                raise ValueError("unlucky")
            os.kill(os.getpid(), signal.SIGKILL)
        return keep(row)

    dataset = processor(ask, harm, engine_kwargs=SPLIT)(numbers(6))
    if how == "a row fails":
        with pytest.raises(Exception, match="unlucky"):
            dataset.materialize()
    else:
        assert [row["id"] for row in rows_of(dataset)] == list(range(6))
    assert flag.exists()
    wait_until(groups, [])
