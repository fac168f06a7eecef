"""headway batch on the real demo model."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway import AsyncLLM
from headway.batch.rows import Row
from headway.batch.runner import WINDOWS_AHEAD, BatchRun, Tally
from headway.batch.writer import OrderedWriter
from headway.cli import main
from headway.messages import SamplingParams

ENGINE = ["--model", "smollm2-135m-instruct", "--kv-cache-memory-bytes", "200000000", "--max-model-len", "512"]
Records = list[dict[str, Any]]


def batch(tmp_path: Path, text: str | bytes, *options: str) -> tuple[int, Records]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    status = main(["batch", str(source), "-o", str(target), *ENGINE, *options])
    assert not target.with_name("out.jsonl.partial").exists()
    return status, [json.loads(line) for line in target.read_text().splitlines()]


def test_rows_are_answered_in_order_and_bad_ones_say_why(tmp_path: Path, capsys) -> None:
    rows = [
        b'{"id": 1, "prompt": "The capital of France is", "sampling_params": {"max_tokens": 4}}',
        b'{"id": 2, "prompt": "broken',
        b'{"id": 3, "messages": [{"role": "user", "content": "What is 2+2?"}], "tag": {"kept": [1, 2]}}',
        b"",
        b'{"id": 4, "prompt": "x", "sampling_params": {"temperature": "hot"}}',
        b'{"id": 5, "prompt": [504, 3575, 282], "sampling_params": {"n": 2, "temperature": 1.0, "max_tokens": 3}}',
        json.dumps({"id": 6, "prompt": "word " * 600}).encode(),
    ]
    status, records = batch(tmp_path, b"\n".join(rows), "--max-tokens", "12")
    assert status == 0
    assert [r.get("id") for r in records] == [1, None, 3, 4, 5, 6]
    paris, broken, sums, hot, several, long = records
    assert "Paris" in paris["response"]["text"]
    assert paris["response"]["finish_reason"] == "length"
    assert paris["response"]["usage"]["completion_tokens"] == 4
    assert broken["line"] == 2
    assert broken["error"].startswith("line 2: not JSON")
    assert sums["tag"] == {"kept": [1, 2]}
    assert sums["response"]["finish_reason"] == "stop"
    assert hot["error"].startswith("line 5: sampling_params.temperature='hot'")
    assert len(several["response"]["samples"]) == 2
    assert "512" in long["error"]
    assert "line 7" in long["error"]
    said = capsys.readouterr()
    assert said.out == ""
    summary, first_error = said.err.splitlines()  # no bar where there is no terminal
    assert summary.startswith("3 rows answered, 3 failed: ")
    for part in ("tokens/s", "of start-up", "threads ", "kernels ", "executor uni: one rank"):
        assert part in summary
    assert first_error.startswith("headway: the first that failed: line 2: not JSON")


def test_an_empty_file_gives_an_empty_file(tmp_path: Path) -> None:
    assert batch(tmp_path, "") == (0, [])


def test_status_1_if_every_row_failed(tmp_path: Path) -> None:
    status, records = batch(tmp_path, "{}\nnope\n")
    assert status == 1
    assert [r["line"] for r in records] == [1, 2]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("absent.jsonl", "out.jsonl", "no such file"),
        (".", "out.jsonl", "is a directory"),
        ("in.jsonl", "in.jsonl", "must be another file than the input"),
        ("in.jsonl", "absent/out.jsonl", "cannot be written"),
    ],
)
def test_files_are_checked_before_a_model_is_loaded(
    source: str, target: str, message: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    words = ["batch", str(tmp_path / source), "-o", str(tmp_path / target), "--model", "no-such-model"]
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_sampling_that_no_row_can_use_is_refused_before_a_model_is_loaded(tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    words = ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out"), "--model", "no-such-model"]
    assert main([*words, "--top-p", "2"]) == 2
    assert capsys.readouterr().err == "headway: top_p=2.0: must be above 0.0 and at most 1.0\n"


def test_a_model_that_is_not_there_leaves_nothing_behind(tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out"), "--model", "./absent/model"]) == 2
    assert "absent" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{i}, {i + 1},"}) + "\n" for i in range(5000)))
    command = [sys.executable, "-m", "headway", "batch", str(source), "-o", str(target), *ENGINE]
    process = subprocess.Popen(
        [*command, "--max-tokens", "8", "--max-num-seqs", "4"], stderr=subprocess.PIPE, text=True
    )
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.05)
    for _ in range(3):  # an impatient one
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    kept = [json.loads(line) for line in partial.read_text().splitlines()]
    assert f"{len(kept)} answered rows are kept in {partial}" in said
    assert kept[0]["prompt"] == "0, 1,"
    assert not target.exists()


def test_rows_flow_through_a_pipe_and_nothing_else_does(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headway", "batch", "-", "-o", "-", *ENGINE, "--max-tokens", "2"]
    given = b'{"prompt": "a", "response": 5, "error": "of an earlier job"}\n{"prompt": "b"}\n'
    done = subprocess.run(command, input=given, capture_output=True, check=True, cwd=tmp_path)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [sorted(r) for r in records] == [["prompt", "response"]] * 2
    assert records[0]["response"]["usage"]["completion_tokens"] == 2
    assert done.stderr.startswith(b"2 rows answered")
    assert list(tmp_path.iterdir()) == []


async def test_rows_are_admitted_one_by_one_and_reading_stays_bounded(tmp_path: Path) -> None:
    """A slow first row holds back the output, the rows after it go on, and only so many of them are read."""
    read = 0

    def rows(count: int) -> Iterator[Row]:
        nonlocal read
        for i in range(count):
            read += 1
            params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=200 if i == 0 else 1)
            yield Row(line=i + 1, fields={"i": i}, params=params, prompt="a")

    ahead: list[int] = []
    engine = {"max_num_seqs": 2, "kv_cache_memory_bytes": 200_000_000, "max_model_len": 512}
    async with AsyncLLM("smollm2-135m-instruct", **engine) as llm:
        with OrderedWriter(tmp_path / "out") as writer:

            def note(tally: Tally) -> None:
                ahead.append(read - writer.next_index)

            tally = await BatchRun(llm, writer, note).run(rows(200))
    window = 4
    assert tally.rows == 200
    assert window < max(ahead) <= (WINDOWS_AHEAD + 1) * window
    assert [json.loads(line)["i"] for line in (tmp_path / "out").read_text().splitlines()] == list(range(200))


def test_a_progress_bar_is_shown_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 3)
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    command = [sys.executable, "-m", "headway", "batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")]
    subprocess.run([*command, *ENGINE, "--max-tokens", "4"], stderr=follower, check=True)
    os.close(follower)
    shown = os.read(leader, 65536).decode()
    os.close(leader)
    assert "3/3" in shown
    assert "tokens/s" in shown
    assert "3 rows answered" in shown


def test_an_answer_is_what_generate_gives(tmp_path: Path) -> None:
    from headway import LLM

    _, (record,) = batch(tmp_path, '{"prompt": "Water boils at"}\n', "--max-tokens", "8")
    with LLM("smollm2-135m-instruct", kv_cache_memory_bytes=200_000_000, max_model_len=512) as llm:
        (out,) = llm.generate("Water boils at", SamplingParams(temperature=0, max_tokens=8))
    assert record["response"]["text"] == out.outputs[0].text


def test_running_out_of_loop_is_not_swallowed(tmp_path: Path) -> None:
    """An engine that ends takes the job with it."""

    async def run() -> None:
        llm = AsyncLLM("smollm2-135m-instruct", kv_cache_memory_bytes=200_000_000, max_model_len=512)
        llm.close()
        row = Row(line=1, fields={}, params=SamplingParams(), prompt="a")
        with OrderedWriter(tmp_path / "out") as writer:
            await BatchRun(llm, writer, lambda tally: None).run(iter([row]))

    from headway.errors import EngineDead

    with pytest.raises(EngineDead):
        asyncio.run(run())
