"""Comparing executors: engines in processes of their own, on a model of seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest

from headway.bench.comparison import Comparison, Row
from headway.bench.engine_process import EngineProcess
from headway.bench.executors import Job, OfflineEngine
from headway.cli import main
from headway.config import EngineArgs
from headway.errors import ConfigError, EngineError


def job(num_prompts: int = 2, output_len: int = 3) -> Job:
    return Job(mode="generate", input_len=8, output_len=output_len, num_prompts=num_prompts, seed=0)


def args(options: list[str]) -> EngineArgs:
    return EngineArgs(model=options[1], load_format="dummy", threads=1, kv_cache_memory_bytes=10_000_000)


def test_executors_are_compared_and_those_that_cannot_run_say_why(tiny: list[str], tmp_path: Path, capsys) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    sizes = ["--input-len", "8", "--output-lens", "1,3", "--concurrency", "2", "--num-prompts", "4", "--repeats", "2"]
    chosen = ["--executors", "uni,mp,absent:A", "--json", str(out), "--report", str(page)]
    assert main(["bench", "executors", *tiny, *sizes, *chosen]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["executor"], r["async_scheduling"], r["output_len"]) for r in rows] == [
        (executor, overlap, output_len)
        for output_len in (1, 3)
        for executor in ("uni", "mp", "absent:A")
        for overlap in (True, False)
    ]
    for row in rows:
        if row["executor"] != "absent:A":
            assert row["startup_s"] > 0
            assert len(row["rows_per_s"]) == 2
            assert row["steps"] == 2 * 2 * row["output_len"]  # two repeats, four prompts two at a time
            assert 0 < row["executor_tax"] < 1
        else:
            assert row["rows_per_s"] == []
            assert "absent" in row["error"]
    table = capsys.readouterr().out
    assert table.count("\n     uni") == table.count("\n      mp") == 4
    assert "start s" in table and "start s" in page.read_text()
    assert "ConfigError: distributed_executor_backend='absent:A'" in table
    text = page.read_text()
    for drawing in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + drawing.partition("</svg>")[0] + "</svg>")
    assert text.count("<svg") == 4
    assert "http" not in text  # self-contained


def test_deltas_are_medians_of_the_repeats_ratios() -> None:
    def row(executor: str, overlap: bool, rates: list[float]) -> Row:
        return Row(
            executor=executor,
            async_scheduling=overlap,
            concurrency=1,
            output_len=1,
            num_prompts=8,
            startup_s=1.0,
            rows_per_s=rates,
            tokens_per_s=None,
        )

    uni, sync, mp = row("uni", True, [10, 20, 10]), row("uni", False, [8, 10, 5]), row("mp", True, [9, 19, 9])
    rows = [uni, sync, mp]
    found = Comparison(model="m", mode="generate", input_len=1, repeats=3, engine={}, versions={}, rows=rows)
    assert found.delta_to_uni(mp) == pytest.approx(-0.1)
    assert found.delta_to_sync(uni) == pytest.approx(1.0)
    assert found.delta_to_uni(uni) is None
    assert found.delta_to_sync(mp) is None


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--output-lens", "1,x"),
        ("--concurrency", "0"),
        ("--async-scheduling", "maybe"),
        ("--executors", ","),
        ("--executors", "uni,pm"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(option: str, value: str, capsys) -> None:
    assert main(["bench", "executors", "--model", "m", option, value]) == 2
    assert f"{option[2:].replace('-', '_')}={value!r}: " in capsys.readouterr().err


def test_an_engine_that_dies_is_an_error_and_leaves_nothing(tiny: list[str]) -> None:
    engine = EngineProcess(OfflineEngine, args(tiny))
    try:
        engine.ready()
        assert engine.run(job()).tokens == 6
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="ended with exit code -9"):
            engine.run(job())
    finally:
        engine.close()
        engine.close()


def test_a_request_the_engine_refuses_is_its_error(tiny: list[str]) -> None:
    engine = EngineProcess(OfflineEngine, args(tiny))
    try:
        engine.ready()
        with pytest.raises(EngineError, match=r"RequestError: .*max_model_len"):
            engine.run(msgspec.structs.replace(job(), input_len=5000))
    finally:
        engine.close()


def test_a_job_ends_with_what_asked_for_it_also_where_a_shell_has_switched_ctrl_c_off(tiny: list[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a child inherits
    try:
        engine = EngineProcess(OfflineEngine, args(tiny))
    finally:
        signal.signal(signal.SIGINT, before)
    engine.ready()
    engine._send(msgspec.structs.replace(job(), num_prompts=100_000))  # pyright: ignore
    engine.close()
    assert engine._process.returncode == 130  # pyright: ignore


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_end_in_the_middle_leaves_no_process(tiny: list[str], how: signal.Signals) -> None:
    sizes = ["--executors", "uni", "--async-scheduling", "on", "--num-prompts", "4", "--repeats", "100000"]
    command = [sys.executable, "-m", "headway", "bench", "executors", *tiny, *sizes]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stderr
        next(line for line in process.stderr if "rows/s" in line)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.send_signal(how)
        process.stderr.read()  # the child holds it too: the end of it all
        assert process.wait(30) == (130 if how == signal.SIGINT else -how)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{children[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_file_of_a_report_is_checked_first(capsys) -> None:
    assert main(["bench", "executors", "--model", "no-such-model", "--report", "/absent/report.html"]) == 2
    assert "report='/absent/report.html'" in capsys.readouterr().err


def test_options_are_words_between_commas() -> None:
    from headway.bench.options import ExecutorsOptions, words

    assert words(" uni, mp,uni,,") == ["uni", "mp"]
    with pytest.raises(ConfigError):
        ExecutorsOptions(repeats=0)


@pytest.mark.long
def test_engines_of_one_ray_cluster_wait_side_by_side(tiny: list[str], tmp_path: Path) -> None:
    out, threads = tmp_path / "out.json", ["--threads", str(os.cpu_count() or 1)]  # a bundle as large as the cluster
    sizes = ["--input-len", "8", "--output-lens", "2", "--concurrency", "2", "--num-prompts", "2", "--repeats", "1"]
    chosen = ["--executors", "ray", "--json", str(out), "--placement-group-timeout-s", "60"]
    assert main(["bench", "executors", *tiny, *threads, *sizes, *chosen]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["executor"], row["error"], row["steps"]) for row in rows] == [("ray", None, 2)] * 2


@pytest.mark.parametrize("executor", ["uni", "mp"])
def test_a_trace_has_a_track_for_every_rank(tiny: list[str], executor: str, tmp_path: Path, capsys) -> None:
    trace, ranks = tmp_path / "trace.json", 2 if executor == "mp" else 1
    sizes = ["--input-len", "8", "--output-len", "3", "--num-prompts", "1", "--trace", str(trace), "-tp", str(ranks)]
    assert main(["bench", "latency", *tiny, *sizes, "--distributed-executor-backend", executor]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"] * 2  # the warm-up too
    events = json.loads(trace.read_text())
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert set(tracks.values()) == {"engine", *(f"rank {rank}" for rank in range(ranks))}
    for track, name in tracks.items():
        spans = [event for event in events if event["ph"] == "X" and event["tid"] == track]
        if name != "engine":
            names = [span["name"] for span in spans if span["name"].startswith("step")]
            assert names == [f"step {i}" for i in range(steps)]
        assert_nested(spans)


def assert_nested(spans: list[dict[str, Any]]) -> None:
    """No two overlap unless one holds the other; floats of this size are exact to a nanosecond or so."""
    open_until: list[float] = []
    for span in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
        start, end = span["ts"], span["ts"] + span["dur"]
        while open_until and open_until[-1] <= start + 0.01:
            open_until.pop()
        assert not open_until or end <= open_until[-1] + 0.01, span
        open_until.append(end)
