"""Comparing ways to do a batch job, on a model of seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from headway.bench.options import ProcessorOptions
from headway.bench.processor import task_of
from headway.bench.processor_modes import MODES, Turn, in_flight, turn_of
from headway.bench.processor_report import Report, Row
from headway.cli import main

SIZES = ["--input-len", "40", "--max-tokens", "6", "--num-prompts", "5", "--repeats", "2", "--max-num-seqs", "4"]


def test_modes_do_the_same_job_and_are_held_against_the_first_of_their_kind(tiny: list[str], tmp_path: Path) -> None:
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    modes = ["generate", "local", "local_two_engines", "local_shared_engine"]
    chosen = ["--mode", ",".join(modes), "--json", str(out), "--report", str(page)]
    assert main(["bench", "processor", *tiny, *SIZES, *chosen]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["mode"], row["engines"], row["slots"]) for row in rows] == [
        ("generate", 1, 4),
        ("local", 1, 4),
        ("local_two_engines", 2, 8),
        ("local_shared_engine", 1, 4),
    ]
    for row in rows:
        turns = MODES[row["mode"]].steps
        assert row["error"] is None and row["startup_s"] > 0
        for turn in row["turns"]:
            assert (turn["rows"], turn["failed"]) == (5, 0)
            assert turn["output_tokens"] == 5 * 6 * turns
            assert turn["input_tokens"] == 5 * (40 if turns == 1 else 40 + 40 + 6 + 16)
            assert 0 < turn["elapsed_s"] <= turn["wall_s"]
            assert turn["peak_in_flight"] == (None if row["mode"] == "generate" else 5)
            # The second turn finds the blocks of 16 that the first one filled, if it was on the same engine.
            assert turn["cached_tokens"] == (5 * 32 if row["mode"] == "local_shared_engine" else 0)
    text = page.read_text()
    for drawing in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + drawing.partition("</svg>")[0] + "</svg>")
    assert text.count("<svg") == 4
    assert "http" not in text  # self-contained


def test_a_mode_that_cannot_run_says_why_and_stops_nobody(tiny: list[str], capsys) -> None:
    absent = ["--distributed-executor-backend", "absent:A"]
    assert main(["bench", "processor", *tiny, *SIZES, "--mode", "generate,local", *absent]) == 1
    said = capsys.readouterr().out
    assert "generate: ConfigError: distributed_executor_backend='absent:A'" in said
    assert "local: ConfigError: distributed_executor_backend='absent:A'" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mode", "locl"], "mode='locl': must be of generate, "),
        (["--mode", ","], "mode=',': must name at least one"),
        (["--mode", "classify,two_engines"], "mode='classify,two_engines': beside classify"),
        (["--mode", "local", "--max-tokens", "3000"], "max_model_len"),
        (["--mode", "classify"], "has no classification head"),
        (["--mode", "local", "--report", "/absent/report.html"], "report='/absent/report.html'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(
    tiny: list[str], options: list[str], message: str, capsys
) -> None:
    assert main(["bench", "processor", *tiny, *SIZES, *options]) == 2
    said = capsys.readouterr().err
    assert message in said and "starting" not in said


def test_the_help_names_every_mode() -> None:
    text = ProcessorOptions.__dataclass_fields__["mode"].metadata["text"]
    assert set(MODES) <= set(re.split(r"[ ,;]", text))


def test_beside_classify_all_classify() -> None:
    assert task_of(ProcessorOptions(mode="generate,local,classify")) == "classify"
    assert task_of(ProcessorOptions(mode="generate,local")) == "generate"


@pytest.mark.long
def test_modes_on_ray_do_the_same_job(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = [*SIZES, "--batch-size", "2", "--num-blocks", "3", "--repeats", "1"]
    assert (
        main(["bench", "processor", *tiny, *sizes, "--mode", "engine,two_engines,shared_engine", "--json", str(out)])
        == 0
    )
    for row in json.loads(out.read_text())["rows"]:
        (turn,) = row["turns"]
        assert (turn["rows"], turn["failed"]) == (5, 0)
        assert turn["output_tokens"] == 5 * 6 * MODES[row["mode"]].steps
        assert turn["cached_tokens"] == (5 * 32 if row["mode"].startswith("shared") else 0)
        assert turn["peak_in_flight"] >= 2


@pytest.mark.long
def test_a_classifier_on_ray(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    model = ["--model", "cross-encoder/ms-marco-minilm-l-6-v2", "--load-format", "dummy", "--threads", "1"]
    sizes = ["--input-len", "8", "--num-prompts", "5", "--repeats", "1", "--json", str(out)]
    assert main(["bench", "processor", *model, *sizes, "--mode", "generate,local,classify"]) == 0
    turns = [row["turns"][0] for row in json.loads(out.read_text())["rows"]]
    assert [(turn["input_tokens"], turn["output_tokens"]) for turn in turns] == [(40, 0)] * 3


def test_rows_in_flight_are_counted_from_their_times() -> None:
    assert in_flight([(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (3.0, 5.0)], slots=4) == (2, 0.5)
    assert in_flight([(0.0, 1.0), (0.0, 2.0), (0.0, 1.0)], slots=2) == (3, 1.0)  # the third one waits
    assert in_flight([(0.0, 1.0)], slots=4) == (1, 0.25)
    peak, filled = in_flight([(0.0, 1.0), (0.0, 3.0), (2.0, 4.0)], slots=2)  # a slot is free from 1 to 2
    assert (peak, filled) == (2, 0.5)


def test_a_row_that_failed_counts_as_one() -> None:
    counts = {"input_tokens": 3, "output_tokens": 2, "cached_tokens": 1}
    well = {"began": [11.0], "ended": [14.0], "error": None, **counts}
    failed = {"error": {"type": "RequestError", "message": "", "stage": "engine"}}
    turn = turn_of([well, failed], 10.0, 15.0, None, slots=1, elsewhere=True)
    assert (turn.rows, turn.failed, turn.input_tokens) == (2, 1, 3)
    assert (turn.startup_s, turn.elapsed_s, turn.wall_s) == (1.0, 3.0, 5.0)


def test_a_ratio_is_the_median_of_the_repeats_ratios() -> None:
    def row(mode: str, seconds: list[float]) -> Row:
        counts = {"rows": 12, "failed": 0, "input_tokens": 0, "output_tokens": 0, "cached_tokens": 0}
        unknown = {"peak_in_flight": None, "filled": None, "peak_rss_mb": None}
        turns = [Turn(wall_s=s, startup_s=0.0, elapsed_s=s, **counts, **unknown) for s in seconds]
        return Row(mode=mode, engines=1, slots=1, turns=turns)

    offline, local, two = row("generate", [1, 2, 1]), row("local", [2, 2, 4]), row("two_engines", [9, 9, 9])
    found = Report(model="m", settings={}, engine={}, versions={}, rows=[offline, local, two])
    assert found.ratio(local) == 0.5
    assert found.ratio(offline) is None and found.ratio(two) is None
