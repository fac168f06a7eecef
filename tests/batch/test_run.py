"""Processors on files of this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.batch.processors import FAKE

from headway.batch import EngineProcessorConfig, build_processor
from headway.batch.job import JobOptions
from headway.errors import ConfigError, RowFailed

ENGINE: dict[str, Any] = {"kv_cache_memory_bytes": 200_000_000, "max_model_len": 512}
QUIET = JobOptions(progress=False)


def preprocess(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": f"{int(row['number'])},", "sampling_params": {"max_tokens": 3, "temperature": 0}}


def postprocess(row: dict[str, Any]) -> dict[str, Any]:
    return {"number": row["number"], "answer": row["generated_text"]}


def config(engine: dict[str, Any] = ENGINE, **settings: Any) -> EngineProcessorConfig:
    return EngineProcessorConfig(model_source="smollm2-135m-instruct", engine_kwargs=engine, **settings)


def test_a_processor_runs_on_files_and_an_engine_serves_several_runs(tmp_path: Path) -> None:
    source, target = tmp_path / "in.csv", tmp_path / "out.parquet"
    source.write_text("number\n1\nbad\n3\n")
    with build_processor(config(should_continue_on_error=True), preprocess, postprocess) as processor:
        tally = processor.run(source, target, QUIET).tally
        table = pq.read_table(target)
        assert table.schema.names == ["number", "answer", "error"]
        assert table.schema.field("error").type == pa.struct(dict.fromkeys(("type", "message", "stage"), pa.string()))
        assert [row["error"] and row["error"]["stage"] for row in table.to_pylist()] == [None, "preprocess", None]
        assert (tally.rows, tally.failed, tally.output_tokens) == (3, 1, 6)
        source.write_text("number\n1\n2\n3\n")
        summary = processor.run(source, target, QUIET)
        assert (summary.tally.failed, pq.read_metadata(target).num_rows) == (0, 3)
        assert summary.startup_s < 1  # it is there


def test_a_processor_stops_at_a_row_that_fails_unless_it_is_to_continue(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"number": 1}, {"number": "bad"}]
    with build_processor(config(FAKE), preprocess, postprocess) as processor, pytest.raises(RowFailed, match="row 2: "):
        processor.run(rows, tmp_path / "out.jsonl", QUIET)


def test_a_job_is_another_one_with_another_function(tmp_path: Path) -> None:
    options = JobOptions(progress=False, resume=True)
    rows = [{"number": 1}]
    with build_processor(config(FAKE), preprocess, postprocess) as processor:
        processor.run(rows, tmp_path / "out.jsonl", options)
    other = build_processor(config(FAKE), preprocess, lambda row: {"text": row["generated_text"]})
    with other, pytest.raises(ConfigError, match="postprocess"):
        other.run(rows, tmp_path / "out.jsonl", options)


def test_pyarrow_is_needed_for_its_files_alone(tmp_path: Path) -> None:
    probe = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from headway.batch.sinks import open_sink; from headway.batch import job\n"
        "from headway.errors import MissingDependencyError\n"
        "try: open_sink(sys.argv[1], 'parquet')\n"
        "except MissingDependencyError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", probe, tmp_path / "o"], check=True, capture_output=True, text=True)
    assert done.stdout == "Parquet and Arrow files need pyarrow: pip install 'headway[arrow]'\n"
