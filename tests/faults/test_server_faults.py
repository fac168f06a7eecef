"""What clients of a server see when one of its processes is killed under load, and what is left of it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.server.conftest import Served

LONG = 300  # tokens; 1.5 s
Answer = tuple[int, list[dict[str, Any]]]
"""Its status, and its body; of a stream, its events. The last one says "lost" where the connection was."""


class Client:
    """Asks with many threads. Each stream is asked for on a connection of its own."""

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url).netloc
        self.threads = ThreadPoolExecutor(64)

    def get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.address, timeout=30)
        connection.request("GET", path)
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def health(self) -> tuple[int, list[bool]]:
        status, body = self.get("/health")
        return status, [replica["up"] for replica in json.loads(body)["replicas"]]

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"headway:{name}{{"))

    def ask(self, rank: int | None = None, max_tokens: int = LONG) -> Future[Answer]:
        return self.threads.submit(self._ask, rank, max_tokens)

    def stream(self, rank: int | None = None) -> tuple[int, Future[Answer]]:
        """Returns once it has begun: its port, and what comes of it."""
        connection, answer = self._post({"stream": True, "max_tokens": LONG}, rank)
        first = answer.readline()
        assert connection.sock is not None
        return connection.sock.getsockname()[1], self.threads.submit(_events, connection, answer, first)

    def _ask(self, rank: int | None, max_tokens: int) -> Answer:
        try:
            connection, answer = self._post({"max_tokens": max_tokens}, rank)
            found = answer.status, [json.load(answer)]
            connection.close()
            return found
        except OSError:
            return 0, [{"lost": True}]

    def _post(
        self, body: dict[str, Any], rank: int | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.address, timeout=60)
        headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
        body = {"prompt": [1, 2, 3], "temperature": 0, "ignore_eos": True, **body}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection, connection.getresponse()


def _events(connection: http.client.HTTPConnection, answer: http.client.HTTPResponse, first: bytes) -> Answer:
    lines = [first]
    try:
        lines += answer.readlines()
        whole = lines[-2] == b"data: [DONE]\n" or b'"error"' in lines[-2]
    except (OSError, http.client.HTTPException):
        whole = False
    found = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    connection.close()
    return answer.status, found if whole else [*found, {"lost": True}]


def code(answer: Answer) -> str | None:
    """Of the error in which it ends; None: it ended as it should."""
    status, found = answer
    if found[-1].get("lost"):
        return "lost"
    if "error" in found[-1]:
        return found[-1]["error"]["code"]
    assert status == 200
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    return None


def codes(answers: list[Future[Answer]]) -> list[str | None]:
    return [code(answer.result()) for answer in answers]


def processes(parent: int) -> dict[str, int]:
    """The children of a process, and theirs, by their names."""
    found: dict[str, int] = {}
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        stat = _stat(pid)
        if stat is not None and stat[1] == parent:
            found |= {stat[0]: pid, **processes(pid)}
    return found


def has_connection(pid: int, port: int) -> bool:
    """Whether a process serves the client at that port."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = (line[9] for line in lines if line[2].endswith(f":{port:04X}"))
    return f"socket:[{inode}]" in [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()]


def gone(pids: list[int]) -> bool:
    return not any(_stat(pid) for pid in pids)


def _stat(pid: int) -> tuple[str, int] | None:
    """Name and parent of a process that runs."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent = rest.split()[:2]
    return None if state == "Z" else (name, int(parent))


def within(limit_s: float, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., tuple[Served, Client]]]:
    """Starts a server; at the end nothing may be left of it."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    servers: list[tuple[Served, Client, list[int]]] = []

    def begin(*words: str) -> tuple[Served, Client]:
        server = Served(*words, "--threads", "1", "--max-model-len", "512")
        client = Client(server.url)
        servers.append((server, client, list(processes(server.process.pid).values())))
        return server, client

    yield begin
    for server, client, pids in servers:
        pids += processes(server.process.pid).values()
        server.end(signal.SIGKILL)
        client.threads.shutdown()
        within(5, partial(gone, pids))
    assert not list(tmp_path.iterdir())


REPLICAS = ("smollm2-135m-instruct", "--distributed-executor-backend", "tests.faults.slow:SlowExecutor", "-dp", "2")


def test_a_killed_process_costs_no_more_than_what_it_was_streaming(begin: Any) -> None:
    server, client = begin(*REPLICAS, "--api-server-count", "2")
    lost = [client.stream(rank=0)[1] for _ in range(6)]
    others = [client.stream(rank=1)[1] for _ in range(6)]
    unanswered = [client.ask() for _ in range(12)]
    within(5, lambda: client.metric("num_requests_running") == 24)
    os.kill(processes(server.process.pid)["headway-dp0"], signal.SIGKILL)
    killed = time.monotonic()
    assert codes(lost) == ["engine_dead"] * 6
    assert client.health() == (200, [False, True])
    within(1, lambda: client.metric("engine_up") == 1)
    status, (body,) = client.ask(rank=0).result()
    assert status == 503 and body["error"]["code"] == "engine_dead" and "it starts again" in body["error"]["message"]
    assert codes(others + unanswered) == [None] * 18
    within(killed + 10 - time.monotonic(), lambda: client.health() == (200, [True, True]))
    assert code(client.ask(rank=0, max_tokens=2).result()) is None

    before = client.metric("request_success_total")
    ends = processes(server.process.pid)
    streams: dict[str, list[Future[Answer]]] = {"headway-api0": [], "headway-api1": []}
    while not all(len(held) > 1 for held in streams.values()):
        port, stream = client.stream()
        streams[next(name for name in streams if has_connection(ends[name], port))].append(stream)
        assert sum(map(len, streams.values())) < 60
    os.kill(ends["headway-api1"], signal.SIGKILL)
    assert codes(streams["headway-api0"]) == [None] * len(streams["headway-api0"])
    assert codes(streams["headway-api1"]) == ["lost"] * len(streams["headway-api1"])
    assert client.metric("request_success_total") == before + len(streams["headway-api0"])
    within(10, lambda: processes(server.process.pid).get("headway-api1", ends["headway-api1"]) != ends["headway-api1"])
    assert any("front end 1 ended with status -9; it starts again in 1 s" in line for line in server.log)

    streams_of_all = [client.stream()[1] for _ in range(8)]
    pids = list(processes(server.process.pid).values())
    server.process.kill()
    assert codes(streams_of_all) == ["lost"] * 8
    within(5, partial(gone, pids))


@pytest.mark.parametrize("front_ends", ["1", "2"])
def test_where_that_is_asked_for_a_killed_replica_ends_the_server(begin: Any, front_ends: str) -> None:
    server, client = begin(*REPLICAS, "--api-server-count", front_ends, "--on-engine-death", "exit")
    _, stream = client.stream(rank=1)
    os.kill(processes(server.process.pid)["headway-dp0"], signal.SIGKILL)
    assert code(stream.result()) == "engine_dead"
    assert server.process.wait(10) == 1
    assert server.end() == 1
    assert "replica 0: its process ended with status -9" in server.log[-1]


def test_an_engine_that_lost_its_worker_starts_again_in_the_same_process(begin: Any, tiny_opt: Path) -> None:
    server, client = begin(str(tiny_opt), "--load-format", "dummy", "--distributed-executor-backend", "mp")
    worker = processes(server.process.pid)["headway-rank0"]
    _, stream = client.stream()
    os.kill(worker, signal.SIGKILL)
    assert code(stream.result()) == "engine_dead"
    within(5, lambda: client.health() == (503, [False]))
    status, (body,) = client.ask().result()
    assert status == 503 and body["error"]["code"] == "engine_dead" and "rank 0" in body["error"]["message"]
    within(10, lambda: client.health() == (200, [True]))
    assert code(client.ask(max_tokens=2).result()) is None


def test_a_worker_that_is_killed_ends_the_server_where_that_is_asked_for(begin: Any, tiny_opt: Path) -> None:
    words = (str(tiny_opt), "--load-format", "dummy", "--distributed-executor-backend", "mp")
    server, _ = begin(*words, "--on-engine-death", "exit")
    os.kill(processes(server.process.pid)["headway-rank0"], signal.SIGKILL)
    assert server.process.wait(10) == 1
    assert server.end() == 1
    assert "the engine has failed: rank 0 ended with status -9" in server.log[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_lets_every_front_end_finish_its_streams(begin: Any, number: int) -> None:
    server, client = begin(*REPLICAS, "--api-server-count", "2")
    streams = [client.stream()[1] for _ in range(8)]
    pids = processes(server.process.pid)
    assert sorted(pids) == ["headway-api0", "headway-api1", "headway-dp0", "headway-dp1"]
    for pid in (server.process.pid, *pids.values()):
        os.kill(pid, number)
    assert codes(streams) == [None] * 8
    assert server.process.wait(10) == 0
    assert gone(list(pids.values()))
    assert len(server.log) == 1


def test_a_killed_front_end_holds_no_places(begin: Any) -> None:
    server, client = begin(*REPLICAS[:3], "--api-server-count", "2", "--max-num-seqs", "1", "--max-waiting", "0")
    port, stream = client.stream()
    assert client.ask().result()[0] == 429
    ends = processes(server.process.pid)
    name = next(name for name in ("headway-api0", "headway-api1") if has_connection(ends[name], port))
    os.kill(ends[name], signal.SIGKILL)
    assert code(stream.result()) == "lost"
    within(5, lambda: client.ask(max_tokens=2).result()[0] == 200)
    assert name not in processes(server.process.pid)


def test_until_all_streams_have_ended_every_front_end_refuses_what_comes(begin: Any) -> None:
    server, client = begin(*REPLICAS[:3], "--api-server-count", "2")
    ends = processes(server.process.pid)
    port, stream = client.stream()
    idle = next(name for name in ("headway-api0", "headway-api1") if not has_connection(ends[name], port))
    while True:
        other = http.client.HTTPConnection(client.address, timeout=30)
        other.request("GET", "/version")
        other.getresponse().read()
        if has_connection(ends[idle], other.sock.getsockname()[1]):
            break
        other.close()
    other.auto_open = False  # the one that is open, and no other
    server.process.send_signal(signal.SIGTERM)
    seen = set[int]()
    refused = time.monotonic()
    while time.monotonic() < refused + 0.5:
        other.request("POST", "/v1/completions", json.dumps({"prompt": [1], "max_tokens": 1}))
        answer = other.getresponse()
        answer.read()
        seen.add(answer.status)
        if seen == {200}:
            refused = time.monotonic()
    other.close()
    assert seen <= {200, 503}
    assert answer.status == 503
    assert code(stream.result()) is None
    assert server.process.wait(10) == 0


def test_what_a_second_signal_cuts_is_told_so(begin: Any) -> None:
    server, client = begin(*REPLICAS[:3])
    streams = [client.stream()[1] for _ in range(4)]
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGINT)
    for stream in streams:
        _, events = stream.result()
        assert events[-1]["error"]["message"] == "the server is shutting down"
    assert server.process.wait(5) == 0
    assert server.end() == 0
    assert server.log[1:] == ["headway: ends with 4 requests unfinished\n"]
