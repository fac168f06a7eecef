"""The server as a process: where it listens, who may call, how it ends."""

from __future__ import annotations

import http.client
import json
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.server.conftest import Served

MODEL = "smollm2-135m-instruct"
CHAT = {"messages": [{"role": "user", "content": "Count to a hundred."}], "temperature": 0, "ignore_eos": True}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


Connect = Callable[[str], http.client.HTTPConnection]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """To a server's URL, or to its socket's path."""
    with ExitStack() as ends:

        def connect(to: str) -> http.client.HTTPConnection:
            netloc = urlsplit(to).netloc
            connection = http.client.HTTPConnection(netloc, timeout=60) if netloc else _UnixConnection(to)
            ends.callback(connection.close)
            return connection

        yield connect


def _post(connection: http.client.HTTPConnection, body: dict[str, Any], **headers: str) -> HTTPResponse:
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    return connection.getresponse()


def _metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = re.findall(r"^headway:(\w+)\{.*?\} (\S+)$", answer.read().decode(), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def _until_idle(url: str) -> dict[str, float]:
    limit = time.monotonic() + 30
    while (seen := _metrics(url))["num_requests_running"]:
        assert time.monotonic() < limit, seen
    return seen


def _refused(*words: str) -> str:
    """What a server that cannot start says."""
    command = [Path(sys.executable).with_name("headway"), "serve", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, str]]:
    """Behind a unix socket, a key and a path, set by a file."""
    path = tmp_path_factory.mktemp("served")
    settings = {
        "model": MODEL,
        "served_model_name": "tiny",
        "uds": str(path / "socket"),
        "api-key": "secret",
        "root_path": "/llm",
        "allowed_origins": "https://a.example,https://b.example",
        "threads": 1,
        "max_body_bytes": 100_000,
        "max_waiting": 2000,
    }
    (path / "serve.yaml").write_text(json.dumps(settings))  # which is YAML
    server = Served("--config", str(path / "serve.yaml"), "--max-waiting", "0", "--max-num-seqs", "1")
    yield server, str(path / "socket")
    assert server.end() == 0, server.log
    assert not (path / "socket").exists()


def test_metrics_count_tokens_and_requests(served: Served, connect: Connect) -> None:
    before = _until_idle(served.url)
    _post(connect(served.url), {**CHAT, "max_tokens": 9}).read()
    after = _metrics(served.url)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] == 9
    assert after["e2e_request_latency_seconds_count"] - before["e2e_request_latency_seconds_count"] == 1
    assert after["request_generation_tokens_sum"] - before["request_generation_tokens_sum"] == 9


def test_time_is_measured_between_the_tokens_of_each_stream(served: Served, connect: Connect) -> None:
    before = _until_idle(served.url)
    _post(connect(served.url), {**CHAT, "max_tokens": 9}).read()
    _post(connect(served.url), {**CHAT, "max_tokens": 9, "stream": True, "n": 2}).read()
    after = _until_idle(served.url)
    assert after["time_to_first_token_seconds_count"] - before["time_to_first_token_seconds_count"] == 1
    assert after["inter_token_latency_seconds_count"] - before["inter_token_latency_seconds_count"] == 16


def test_a_client_that_leaves_ends_its_request(served: Served, connect: Connect) -> None:
    before, aborted = _until_idle(served.url)["generation_tokens_total"], _aborted(served.url)
    connection = connect(served.url)
    stream = _post(connection, {**CHAT, "stream": True, "max_tokens": 4000})
    stream.readline()
    assert _metrics(served.url)["num_requests_running"] == 1
    stream.close()
    connection.close()
    after = _until_idle(served.url)["generation_tokens_total"]
    assert after - before < 1000
    assert _aborted(served.url) == aborted + 1


def _aborted(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        (count,) = re.findall(r'request_success_total\{finished_reason="abort".*\} (\S+)', answer.read().decode())
    return float(count)


@pytest.mark.parametrize("rank, names", [("first", "X-data-parallel-rank"), ("1", "data_parallel_rank")])
def test_a_replica_that_there_is_not_is_named(served: Served, connect: Connect, rank: str, names: str) -> None:
    answer = _post(connect(served.url), {**CHAT, "max_tokens": 1}, **{"X-data-parallel-rank": rank})
    assert answer.status == 400
    assert json.load(answer)["error"]["param"] == names


def test_health_tells_of_every_replica(served: Served) -> None:
    with urllib.request.urlopen(f"{served.url}/health") as answer:
        assert json.load(answer) == {"status": "up", "replicas": [{"replica": 0, "up": True, "why": ""}]}


def test_who_has_no_key_is_refused(guarded: tuple[Served, str], connect: Connect) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        answer = _post(connect(guarded[1]), {**CHAT, "max_tokens": 1}, **headers)
        assert answer.status == 401
        assert json.load(answer)["error"]["type"] == "authentication_error"


def test_who_has_the_key_is_answered(guarded: tuple[Served, str], connect: Connect) -> None:
    answer = _post(connect(guarded[1]), {**CHAT, "model": "tiny", "max_tokens": 2}, Authorization="Bearer secret")
    assert answer.status == 200
    assert json.load(answer)["model"] == "tiny"


def test_health_needs_no_key(guarded: tuple[Served, str], connect: Connect) -> None:
    connection = connect(guarded[1])
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200


def test_pages_of_other_origins_may_call_if_they_are_named(guarded: tuple[Served, str], connect: Connect) -> None:
    allowed: dict[str, str | None] = {}
    for origin in ("https://b.example", "https://c.example"):
        connection = connect(guarded[1])
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        connection.request("OPTIONS", "/v1/chat/completions", headers=asked)
        allowed[origin] = connection.getresponse().getheader("Access-Control-Allow-Origin")
    assert allowed == {"https://b.example": "https://b.example", "https://c.example": None}


def test_a_body_that_is_too_large_is_refused(guarded: tuple[Served, str], connect: Connect) -> None:
    body = {**CHAT, "user": "x" * 100_000}
    answer = _post(connect(guarded[1]), body, Authorization="Bearer secret")
    assert answer.status == 413
    assert "max_body_bytes=100000" in json.load(answer)["error"]["message"]


def test_large_bodies_that_do_not_end_take_bounded_memory(guarded: tuple[Served, str], connect: Connect) -> None:
    sockets: list[socket.socket] = []
    for _ in range(66):
        connection = connect(guarded[1])
        connection.putrequest("POST", "/tokenize")
        for name, value in {"Authorization": "Bearer secret", "Content-Length": "100000"}.items():
            connection.putheader(name, value)
        connection.endheaders(b" " * 99_999)
        sockets.append(connection.sock)
    answered, _, _ = select.select(sockets, [], [], 10)
    assert {one.recv(12) for one in answered} == {b"HTTP/1.1 429"}
    answer = _post(connect(guarded[1]), {**CHAT, "max_tokens": 1}, Authorization="Bearer secret")
    assert answer.status == 200


def test_more_requests_than_may_wait_are_told_to_come_again(guarded: tuple[Served, str], connect: Connect) -> None:
    connection = connect(guarded[1])
    stream = _post(connection, {**CHAT, "stream": True, "max_tokens": 4000}, Authorization="Bearer secret")
    stream.readline()
    answer = _post(connect(guarded[1]), {**CHAT, "max_tokens": 1}, Authorization="Bearer secret")
    stream.close()
    connection.close()
    assert answer.status == 429
    assert answer.getheader("Retry-After") == "1"
    assert json.load(answer)["error"]["type"] == "rate_limit_error"


def test_on_sigterm_running_requests_finish_and_new_ones_are_refused(connect: Connect) -> None:
    server = Served(MODEL, "--threads", "1")
    running, late = connect(server.url), connect(server.url)
    late.connect()
    stream = _post(running, {**CHAT, "stream": True, "max_tokens": 200})
    first = stream.readline()
    server.process.send_signal(signal.SIGTERM)
    while (answer := _post(late, {**CHAT, "max_tokens": 1})).status == 200:
        answer.read()
    assert answer.status == 503
    rest = (first + stream.read()).decode().split("\n\n")
    assert rest[-2:] == ["data: [DONE]", ""]
    assert json.loads(rest[-3].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert server.end() == 0
    assert len(server.log) == 1, server.log


def test_a_port_that_is_taken_is_said_before_the_model_loads() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port={port}" in _refused("nothing-of-this-name", "--port", port)


def test_a_file_that_is_no_socket_stays_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("words")
    assert "no socket" in _refused(MODEL, "--uds", str(path))
    assert path.read_text() == "words"


def test_a_socket_that_somebody_has_removed_is_no_failure(tmp_path: Path) -> None:
    server = Served(MODEL, "--distributed-executor-backend", "tests.server.wide:Wide", "--uds", str(tmp_path / "s"))
    (tmp_path / "s").unlink()
    assert server.end() == 0, server.log


@pytest.mark.parametrize("name", ["host", "api_key", "uds"])
def test_a_variable_of_the_shell_that_was_not_set_opens_nothing(name: str) -> None:
    assert f"{name}=''" in _refused("nothing-of-this-name", f"--{name.replace('_', '-')}", "")


def test_authorities_of_clients_without_a_certificate_of_its_own_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").touch()
    assert "needs ssl_certfile" in _refused(MODEL, "--ssl-ca-certs", str(tmp_path / "ca.pem"))


def test_connections_may_be_as_many_as_the_system_allows(connect: Connect) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        server = Served(MODEL, "--distributed-executor-backend", "tests.server.wide:Wide")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for _ in range(150):
        connection = connect(server.url)
        connection.request("GET", "/health")
        assert connection.getresponse().read()
    assert server.end() == 0, server.log


def test_a_file_of_options_that_cannot_be_read_is_named() -> None:
    assert "nowhere.yaml" in _refused("--config", "nowhere.yaml")
