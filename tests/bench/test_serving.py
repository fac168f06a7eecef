"""A server under load, over a fake executor: real processes and sockets, tokens at once."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from headway.bench.load import drive
from headway.cli import main
from headway.errors import EngineError

FAKE = ["--model", "smollm2-135m-instruct", "--distributed-executor-backend", "headway.executor.fake:FakeExecutor"]
SIZES = ["--concurrency", "3", "--num-prompts", "7", "--input-len", "5", "--output-len", "6", "--repeats", "2"]


def report(tmp_path: Path, *more: str) -> dict[str, Any]:
    assert main(["bench", "serve", *FAKE, *SIZES, *more, "--json", str(tmp_path / "out.json")]) == 0
    return json.loads((tmp_path / "out.json").read_text())


def test_a_server_is_held_against_the_engine_alone(tmp_path: Path) -> None:
    seen = report(tmp_path)
    assert len(seen["server_tokens_per_s"]) == len(seen["llm_tokens_per_s"]) == 2
    assert seen["ratio"] > 0
    assert 0 < seen["startup_s"] <= seen["first_token_s"]
    assert 0 < seen["ttft_ms"]["p50"] <= seen["e2e_ms"]["p99"]
    assert seen["itl_ms"]["p50"] >= 0


def test_conversations_need_no_stream(tmp_path: Path) -> None:
    seen = report(tmp_path, "--endpoint", "chat", "--no-stream", "--no-baseline")
    assert seen["ratio"] is None
    assert "ttft_ms" not in seen
    assert seen["requests_per_s"] * 6 == pytest.approx(sorted(seen["server_tokens_per_s"])[0], rel=1)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_an_end_in_the_middle_leaves_neither_server_nor_engine(how: signal.Signals) -> None:
    command = [sys.executable, "-m", "headway", "bench", "serve", *FAKE, *SIZES, "--repeats", "100000"]
    shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # as one that starts jobs in the background
    with subprocess.Popen([*shell, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stderr
        next(line for line in process.stderr if b"LLM.generate" in line)
        process.send_signal(how)
        process.stderr.read()  # its children hold it too: the end of them all
        assert process.wait(30) == -how


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nlate", "status 429: late"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\ndata: ", "ended early"),
        (b"", "closed a connection"),
    ],
)
def test_a_server_that_does_not_answer_is_an_error(answer: bytes, message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(EngineError, match=message):
            asyncio.run(drive(url, "/v1/completions", [b"{}"], 1, {}))
        thread.join()
