"""headway batch --ray: files through a real Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray.data")

from tests.batch.processors import FAKE

from headway.cli import main

ENGINE = ["--model", "smollm2-135m-instruct", "--max-num-seqs", "8", "--max-model-len", "256", "--threads", "1"]
ENGINE += ["--distributed-executor-backend", FAKE["distributed_executor_backend"]]


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.iterdir()) for line in file.read_text().splitlines()]


def test_a_job_that_is_resumed_answers_the_rows_that_are_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = tmp_path / "in.jsonl", tmp_path / "out"
    rows: list[dict[str, Any]] = [{"id": 0, "text": "one"}, {"id": 1}, {"id": 2, "text": "three"}]
    job = [str(source), "-o", str(folder), "--ray", "local", "--resume", "--id-column", "id", "--max-tokens", "4"]
    for count in (2, 3):
        source.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        assert main(["batch", *job, "--prompt-template", "{text} and", *ENGINE]) == 0
        found = written(folder)
        assert sorted(row["id"] for row in found) == list(range(count))
    assert [row["id"] for row in found if row.get("error")] == [1]
    assert "2 rows answered, 1 failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "give --resume and --id-column together"),
        (["--retry-failed"], "retry_failed=True: is not for --ray"),
        (["--output-format", "csv"], "output_format='csv': on Ray it must be one of jsonl, parquet"),
    ],
)
def test_what_ray_cannot_do_is_told(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    job = ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out"), "--ray", "local", *arguments, *ENGINE]
    assert main(job) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    program = "import sys; sys.modules['ray'] = None\nfrom headway.cli import main; sys.exit(main(sys.argv[1:]))"
    job = ["batch", "in.jsonl", "-o", "out", "--ray", "local", *ENGINE]
    command = [sys.executable, "-c", program, *job]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "headway: datasets need Ray Data: pip install 'headway[ray]'\n")
