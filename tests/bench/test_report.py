from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from headway.bench.report import accounting, check_file, peak_rss_mb, percentiles, process_age_s, publish
from headway.bench.workload import random_prompts
from headway.engine import StepTimes
from headway.errors import ConfigError
from headway.messages import WorkerInfo


def worker_info(**fields: Any) -> WorkerInfo:
    """Of a model in this process, but for the fields that are given."""
    numbers = dict.fromkeys(("num_blocks", "block_size", "vocab_size", "weights_bytes", "kv_bytes"), 0)
    info = {"executor": "uni", "threads": 1, "kernels": "cpu", "program": True, "startup_s": {}, "pids": [os.getpid()]}
    return WorkerInfo(**{**numbers, **info, **fields})


def test_prompts_are_those_every_engine_gets() -> None:
    rng = random.Random(5)
    expected = [[rng.randrange(100, 40000) for _ in range(3)] for _ in range(2)]
    assert random_prompts(input_len=3, num_prompts=2, seed=5) == expected
    assert random_prompts(input_len=3, num_prompts=2, seed=6) != expected
    assert max(random_prompts(input_len=500, num_prompts=1, seed=5, vocab_size=500)[0]) < 500


def test_percentiles_are_measured_values() -> None:
    assert percentiles([float(i) for i in range(1, 101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0}


def test_a_report_is_one_line_and_a_file(tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    report = {"rows": 1, **accounting(StepTimes(steps=3, wait=3.0, update=1.0, model=2.5, in_step=3.0))}
    publish(report, str(path))
    out, said = capsys.readouterr()
    assert json.loads(out) == json.loads(path.read_text()) == report
    assert "executor tax 25.00% over 3 steps" in said
    assert "wait 75.0%" in said
    assert "model 62.5%" in said


def test_a_report_without_a_place_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="json="):
        check_file(str(tmp_path / "missing" / "report.json"))


def test_the_process_knows_its_age_and_its_peak_memory() -> None:
    first = process_age_s()
    assert first is not None
    time.sleep(0.05)
    assert 0.02 < (process_age_s() or 0) - first < 5
    assert 5 < (peak_rss_mb(worker_info()) or 0) < 100_000


def test_memory_is_that_of_all_processes_where_they_are_here() -> None:
    alone = peak_rss_mb(worker_info())
    running = "print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", running], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()  # it has become the program that it is to be
        both = peak_rss_mb(worker_info(pids=[os.getpid(), other.pid]))
        other.kill()
    assert alone is not None and both is not None and both > alone
    assert peak_rss_mb(worker_info(executor="ray")) is None


def test_memory_of_a_process_that_has_ended_is_not_known() -> None:
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert peak_rss_mb(worker_info(pids=[ended.pid])) is None
