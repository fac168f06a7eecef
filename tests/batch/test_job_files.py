"""What a job's files may be, and that it has them for itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headway.batch.durable import locked
from headway.batch.flow import Flow
from headway.batch.job import Job, JobOptions, run
from headway.errors import ConfigError, HeadwayError


def job(source: Any, target: Path, **options: Any) -> Job:
    return Job(source, target, JobOptions(progress=False, **options), {"model": "m"})


def do(source: Any, target: Path, **options: Any) -> int:
    """How many rows failed; rows pass through."""
    return run(job(source, target, **options), Flow([])).tally.failed


def test_an_output_is_one_jobs_at_a_time(tmp_path: Path) -> None:
    out, lock = tmp_path / "out.jsonl", tmp_path / "out.jsonl.lock"
    hold = f"from headway.batch.durable import *\nwith locked(Path({str(lock)!r})) as free: print(free); input()"
    command = [sys.executable, "-uc", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout and other.stdout.readline() == "True\n"
        with pytest.raises(ConfigError, match="is being written by another job"):
            do([{"a": 1}], out)
        assert [path.name for path in tmp_path.iterdir()] == [lock.name]
        other.kill()
    assert do([{"a": 1}], out) == 0  # what a kill leaves is nobody's
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_lock_that_was_removed_is_taken_anew(tmp_path: Path) -> None:
    with locked(tmp_path / "lock") as mine:
        with locked(tmp_path / "lock") as free:
            assert (mine, free) == (True, False)
        (tmp_path / "lock").unlink()
        with locked(tmp_path / "lock") as free:
            assert free
    assert not list(tmp_path.iterdir())


def test_a_job_that_another_finished_meanwhile_is_not_continued(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    late = job([{"a": 1}], out, resume=True)
    assert do([{"a": 1}], out, resume=True) == 0
    with pytest.raises(ConfigError, match="is being written by another job"):
        run(late, Flow([]))
    assert out.read_text() == '{"a":1}\n'


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
def test_an_input_that_cannot_be_stored_is_an_error_without_it(name: str, tmp_path: Path) -> None:
    assert do([{"id": 0, "image": object()}, {"id": 1}], tmp_path / name) == 1
    assert do([{"id": 0, "image": "\ud800"}, {"id": 1}], tmp_path / "text.jsonl") == 1
    failed, well = map(json.loads, (tmp_path / "text.jsonl").read_text().splitlines())
    assert (failed["id"], failed["error"]["stage"], well) == (0, "output", {"id": 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_format": "parqet"}, "output_format='parqet': must be one of arrow, csv, jsonl, openai, parquet"),
        ({"input_format": "json"}, "input_format='json': must be one of"),
        ({"output_format": "openai"}, "output_format='openai': is for input_format openai"),
    ],
)
def test_formats_are_those_that_are_known(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HeadwayError, match=message):
        job([{"a": 1}], tmp_path / "out", **options)


def test_rows_on_their_way_are_no_input(tmp_path: Path) -> None:
    source = tmp_path / "out.jsonl.partial"
    source.write_text('{"a": 1}\n')
    for changed in ({"target": tmp_path / "out.jsonl"}, {"target": tmp_path / "o", "errors": tmp_path / "out.jsonl"}):
        with pytest.raises(ConfigError, match="must be another file than the input"):
            job(source, **changed)


def test_rows_are_said_to_be_kept_if_the_next_run_has_them(tmp_path: Path) -> None:
    """In a process whose files may have 16 kB: of the rows that were answered only some could be committed."""
    probe = (
        "import resource, sys; from headway.batch.job import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16384,) * 2)\n"
        "rows = [{'id': i, 'text': 'x' * 100} for i in range(1000)]\n"
        "job = Job(rows, sys.argv[1], JobOptions(progress=False, resume=True), {})\n"
        "try: run(job, Flow([]))\n"
        "except ConfigError as error: print(job.kept, Job(rows, sys.argv[1], JobOptions(resume=True), {}).kept, error)"
    )
    said = subprocess.check_output([sys.executable, "-c", probe, tmp_path / "out.jsonl"], text=True)
    assert said.startswith("None None output=")
    assert "cannot be written: File too large" in said
