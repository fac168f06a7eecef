"""The benchmarks on the real demo model, at a size of seconds."""

from __future__ import annotations

import json
from pathlib import Path

from headway.cli import main

ENGINE = ["--model", "smollm2-135m-instruct", "--kv-cache-memory-bytes", "200000000", "--max-model-len", "512"]


def test_throughput_reports_the_workload_it_ran(tmp_path: Path, capsys) -> None:
    path = tmp_path / "report.json"
    sizes = ["--input-len", "8", "--output-len", "4", "--num-prompts", "3", "--repeats", "2", "--seed", "1"]
    assert main(["bench", "throughput", *ENGINE, *sizes, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert (report["input_len"], report["output_len"], report["num_prompts"]) == (8, 4, 3)
    assert len(report["elapsed_s"]) == 2
    typical = sum(report["elapsed_s"]) / 2
    assert abs(report["output_tokens_per_s"] * typical - 12) < 0.5
    assert abs(report["rows_per_s"] * typical - 3) < 0.2
    assert report["startup_s"] > 0
    assert (report["executor"], report["async_scheduling"], report["enable_prefix_caching"]) == ("uni", True, False)
    assert report["steps"] == 8  # two repeats of one prefill and three decodes
    assert 0 < report["executor_tax"] < 1
    assert 0 < report["shares"]["model"] < 1
    assert report["peak_rss_mb"] > 270  # the weights alone
    assert {"headway", "torch"} <= set(report["versions"])


def test_throughput_classifies_and_embeds(capsys) -> None:
    sizes = ["--input-len", "8", "--num-prompts", "5", "--repeats", "1"]
    cross_encoder = ["cross-encoder/ms-marco-minilm-l-6-v2", "--load-format", "dummy"]
    for mode, model in (("classify", cross_encoder), ("embed", ["all-minilm-l6-v2"])):
        assert main(["bench", "throughput", "--mode", mode, "--model", *model, *sizes]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["mode"], report["output_tokens_per_s"]) == (mode, None)
        assert report["rows_per_s"] > 0


def test_latency_reports_percentiles(tmp_path: Path, capsys) -> None:
    assert main(["bench", "latency", *ENGINE, "--input-len", "8", "--output-len", "5", "--num-prompts", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        assert 0 < report[name]["p50"] <= report[name]["p90"] <= report[name]["p99"]


def test_a_report_that_cannot_be_written_costs_no_measurement(capsys) -> None:
    assert main(["bench", "throughput", "--model", "no-such-model", "--json", "/absent/report.json"]) == 2
    assert "json='/absent/report.json'" in capsys.readouterr().err
