"""headway batch on the real demo model."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from headway.cli import main

ENGINE = ["--model", "smollm2-135m-instruct", "--kv-cache-memory-bytes", "200000000", "--max-model-len", "512"]
Records = list[dict[str, Any]]


def batch(tmp_path: Path, text: str | bytes, *options: str) -> tuple[int, Records]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    status = main(["batch", str(source), "-o", str(target), *ENGINE, *options])
    assert {path.name for path in tmp_path.iterdir()} <= {"in.jsonl", "out.jsonl", "out.jsonl.ledger", "failed.jsonl"}
    return status, records_of(target)


def records_of(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_answered_in_order_and_bad_ones_say_why(tmp_path: Path, capsys) -> None:
    rows = [
        b'{"id": 1, "prompt": "The capital of France is", "sampling_params": {"max_tokens": 4}}',
        b'{"id": 2, "prompt": "broken',
        b'{"id": 3, "messages": [{"role": "user", "content": "What is 2+2?"}], "tag": {"kept": [1, 2]}}',
        b"",
        b'{"id": 4, "prompt": "x", "sampling_params": {"temperature": "hot"}}',
        b'{"id": 5, "tokenized_prompt": [504, 3575], "sampling_params": {"n": 2, "temperature": 1.0, "max_tokens": 3}}',
        json.dumps({"id": 6, "prompt": "word " * 600}).encode(),
    ]
    errors = tmp_path / "failed.jsonl"
    status, records = batch(tmp_path, b"\n".join(rows), "--max-tokens", "12", "--errors", str(errors))
    assert status == 0
    assert [r.get("id") for r in records] == [1, None, 3, 4, 5, 6]
    paris, broken, sums, hot, several, long = records
    assert "Paris" in paris["generated_text"]
    assert (paris["finish_reason"], paris["num_generated_tokens"]) == ("length", 4)
    assert broken == {"error": {"type": "InvalidRow", "message": broken["error"]["message"], "stage": "read"}}
    assert broken["error"]["message"].startswith("line 2: not JSON")
    assert sums["tag"] == {"kept": [1, 2]}
    assert sums["finish_reason"] == "stop"
    assert hot["error"]["type"] == "RequestError"
    assert hot["error"]["message"].startswith("sampling_params.temperature='hot'")
    assert hot["error"]["stage"] == "engine"
    assert {*hot} == {"id", "prompt", "sampling_params", "error"}
    assert len(several["outputs"]) == 2
    assert "512" in long["error"]["message"]
    assert records_of(errors) == [broken, hot, long]
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
    assert [r["error"]["stage"] for r in records] == ["engine", "read"]


def test_the_job_ends_at_a_row_that_fails_if_it_is_to(tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": 5}\n{"prompt": "b"}\n')
    words = ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *ENGINE, "--max-tokens", "2"]
    assert main([*words, "--stop-on-error"]) == 1
    assert "headway: line 2: prompt=" in capsys.readouterr().err
    assert len(records_of(tmp_path / "out.jsonl.partial")) == 1


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "2"], "top_p=2.0: must be above 0.0 and at most 1.0"),
        (["--sampling", '{"max_token": 2}'], "sampling_params.max_token=2: unknown; did you mean max_tokens?"),
        (["--prompt-template", "Summarise"], "prompt_template='Summarise': must have the names of columns in braces"),
        (["--prompt-template", "{a", "--errors", "x"], "prompt_template='{a': must have columns in braces"),
        (["--prompt-template", "{a}", "--message-template", "{a}"], "cannot be given beside prompt_template"),
        (["--resume", "-o", "-"], "what went through a pipe cannot be continued"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(options: list[str], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    words = ["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out"), "--model", "no-such-model"]
    assert main([*words, *options]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_model_that_is_not_there_leaves_nothing_behind(tmp_path: Path, capsys) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out"), "--model", "./absent/model"]) == 2
    assert "absent" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_job_that_ended_early_is_finished_by_the_same_command(how: signal.Signals, tmp_path: Path, capsys) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": f"{i}, {i + 1},"}) + "\n" for i in range(100)))
    options = ["-o", str(target), *ENGINE, "--max-tokens", "4", "--max-num-seqs", "4", "--flush-interval-s", "0.05"]
    words = ["batch", str(source), *options, "--resume"]
    process = subprocess.Popen([sys.executable, "-m", "headway", *words], stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out.jsonl.partial"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.02)
    for _ in range(3):  # an impatient one
        process.send_signal(how)
        time.sleep(0.05)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in said
    assert (f"answered rows are kept in {partial}; --resume goes on" in said) == (how == signal.SIGINT)
    assert not target.exists()
    assert main(["batch", str(source), *options, "--resume", "--sampling", '{"n": 2}']) == 2  # another job
    assert "without resume it starts over" in capsys.readouterr().err
    assert main(words) == 0
    assert [record["id"] for record in records_of(target)] == list(range(100))
    assert capsys.readouterr().err.startswith("100 rows answered, 0 failed: ")
    assert main(words) == 0
    assert capsys.readouterr().err == "100 rows answered, 0 failed: the job was complete\n"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_job_killed_at_twenty_random_moments_has_every_row_once(tmp_path: Path, capsys) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": f"{i}, {i + 1},"}) + "\n" for i in range(2000)))
    words = ["batch", str(source), "-o", str(target), *ENGINE, "--max-tokens", "16", "--resume"]
    moments, kills = random.Random(0), 0
    while kills < 20:
        with subprocess.Popen([sys.executable, "-m", "headway", *words], stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(moments.uniform(2, 8))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            else:  # it was faster
                target.unlink()
    assert main(words) == 0
    assert [record["id"] for record in records_of(target)] == list(range(2000))
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl", "out.jsonl.ledger"}


def test_rows_flow_through_a_pipe_and_nothing_else_does(tmp_path: Path) -> None:
    """A row is answered before the next one is there."""
    command = [sys.executable, "-m", "headway", "batch", "-", "-o", "-", *ENGINE, "--max-tokens", "2"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        answers: Records = []
        for row in ({"prompt": "a", "error": "of an earlier job"}, {"prompt": "b"}):
            process.stdin.write(json.dumps(row).encode() + b"\n")
            process.stdin.flush()
            answers.append(json.loads(process.stdout.readline()))
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.stderr.read().startswith(b"2 rows answered")
    assert [(answer["num_generated_tokens"], "error" in answer) for answer in answers] == [(2, False)] * 2
    assert list(tmp_path.iterdir()) == []


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


def test_prompts_are_made_from_columns(tmp_path: Path) -> None:
    """And an answer is what generate() gives."""
    from headway import LLM, SamplingParams

    (tmp_path / "in.csv").write_text("what,missing\nWater,\n")
    options = ["--prompt-template", "{what} boils at", "--sampling", '{"max_tokens": 8}', *ENGINE]
    assert main(["batch", str(tmp_path / "in.csv"), "-o", str(tmp_path / "out.jsonl"), *options]) == 0
    (record,) = records_of(tmp_path / "out.jsonl")
    assert (record["what"], record["prompt"]) == ("Water", "Water boils at")
    with LLM("smollm2-135m-instruct", kv_cache_memory_bytes=200_000_000, max_model_len=512) as llm:
        (out,) = llm.generate("Water boils at", SamplingParams(temperature=0, max_tokens=8))
    assert record["generated_text"] == out.outputs[0].text
    options[1] = "{absent} boils at"
    assert main(["batch", str(tmp_path / "in.csv"), "-o", str(tmp_path / "out.jsonl"), *options]) == 1
    (record,) = records_of(tmp_path / "out.jsonl")
    assert record["error"]["message"].endswith("the row has no column 'absent'")


def test_texts_are_embedded_from_and_into_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array(["one", "two", None], pa.large_string())
    pq.write_table(pa.table({"id": pa.array([1, 2, 3], pa.int16()), "prompt": texts}), tmp_path / "in.parquet")
    words = ["batch", str(tmp_path / "in.parquet"), "-o", str(tmp_path / "out.parquet"), "--task", "embed"]
    assert main([*words, "--model", "all-minilm-l6-v2"]) == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("id").type == pa.int16()
    assert table.schema.field("prompt").type == pa.large_string()
    assert table.schema.field("embeddings").type == pa.list_(pa.float32())
    assert [len(one or []) for one in table["embeddings"].to_pylist()] == [384, 384, 0]
    assert [error and error["stage"] for error in table["error"].to_pylist()] == [None, None, "engine"]
