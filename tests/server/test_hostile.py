"""What a client may send, and what that costs the others: an answer in time, and /health meanwhile."""

from __future__ import annotations

import http.client
import json
import re
import socket
import statistics
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.server.conftest import Served

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
HEALTH_S = 2.0
"""That /health may take meanwhile: 0.4 s was the worst seen beside other work, 1.2 s beside 500 clients."""


def _endless(stream: bool) -> bytes:
    body = json.dumps({"prompt": "hi", "n": 512, "max_tokens": 2000, "ignore_eos": True, "stream": stream}).encode()
    return b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def _connect(server: Served) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def _post(server: Served, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


class _Watch:
    """The slowest answer of /health meanwhile."""

    def __init__(self, server: Served) -> None:
        self._netloc = urlsplit(server.url).netloc
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seconds: list[float] = []

    def _run(self) -> None:
        connection = http.client.HTTPConnection(self._netloc, timeout=60)
        while not self._stop.is_set():
            began = time.perf_counter()
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
            self.seconds.append(time.perf_counter() - began)
            self._stop.wait(0.005)
        connection.close()

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def _nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def _chain(length: int) -> dict[str, Any]:
    links = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {"type": "string"}}}


def _structured(**given: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": MESSAGES, "max_tokens": 2, "structured_outputs": given}


def _prompt(**given: Any) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"prompt": "hi", "max_tokens": 2, **given}


STARS = "start: a0\n" + "\n".join(f'a{i}: {"(" * 20}a{i + 1} "y"{")*" * 20}' for i in range(200)) + '\na200: "x"'
HOSTILE: dict[str, tuple[str, Any]] = {
    "empty": (CHAT, b""),
    "no object": (CHAT, b"[]"),
    "NaN": (COMPLETIONS, b'{"prompt": "a", "temperature": NaN}'),
    "a number beyond all": (COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}'),
    "half a pair of surrogates": (COMPLETIONS, b'{"prompt": "\\ud800"}'),
    "no UTF-8": (COMPLETIONS, b'{"prompt": "\xff"}'),
    "UTF-16": (CHAT, json.dumps({"messages": MESSAGES}).encode("utf-16")),
    "5000 digits": (COMPLETIONS, b'{"prompt": "a", "metadata": {"a": ' + b"9" * 5000 + b"}}"),
    "deep lists": (CHAT, b'{"messages": [{"role": "user", "content": "a", "x":' + b"[" * 100_000),
    "deep objects": (CHAT, f'{{"messages": [{{"role": "user", "content": "a", "x": {_nested(5000)}}}]}}'.encode()),
    "a million lists": (CHAT, b'{"messages": [{"role": "user", "content": "a", "x": [' + b"[]," * 10**6 + b"[]]}]}"),
    "a name like a path": (CHAT, json.dumps({"messages": [], " - at `$" * 100_000 + "\n": 1}).encode()),
    "wrong token": (COMPLETIONS, {"prompt": [10**30]}),
    "no prompts": (COMPLETIONS, {"prompt": []}),
    "10,000 prompts": (COMPLETIONS, {"prompt": ["a"] * 10_000}),
    "2 million prompts": (COMPLETIONS, b'{"prompt": [' + b'"a",' * 2_000_000 + b'"a"]}'),
    "4 million token ids": ("/v1/embeddings", b'{"input": [' + b"1," * 4_000_000 + b"1]}"),
    "too long a prompt": (COMPLETIONS, {"prompt": "a" * 4_000_000}),
    "100,000 stops": _prompt(stop=[f"zz{i}" for i in range(100_000)]),
    "100,000 biases": _prompt(logit_bias={str(i): 1 for i in range(100_000)}),
    "100,000 stop tokens": _prompt(stop_token_ids=[1] * 100_000),
    "100,000 bad words": _prompt(bad_words=[f"bad{i}" for i in range(100_000)]),
    "a long bad word": _prompt(bad_words=["bad " * 200_000]),
    "all log probabilities": (CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 49152}),
    "all of the prompt's": _prompt(prompt_logprobs=49152),
    "many of many prompts": _prompt(prompt=[[5] * 8000] * 3, prompt_logprobs=100),
    "many of an echo's samples": _prompt(prompt=[5] * 8000, echo=True, logprobs=100, n=1000),
    "many of many samples": _prompt(n=1000, logprobs=100, max_tokens=8000),
    "n": _prompt(n=1025),
    "top_k": _prompt(top_k=10**30),
    "700,000 texts": ("/v1/embeddings", {"input": ["a"] * 700_000}),
    "100,000 documents": ("/v1/rerank", {"query": "a", "documents": ["b"] * 100_000}),
    "a number beyond a word in a schema": _structured(json={"type": "integer", "minimum": 10**30}),
    "a deep schema": _structured(json=_nested(500)),
    "a schema without an end": _structured(json='{"items":' * 10_000),
    "a wide schema": _structured(json={"type": "object", "properties": {f"a{i}": {} for i in range(20_000)}}),
    "a schema elsewhere": _structured(json={"$ref": "file:///etc/passwd"}),
    "a regex in a regex": _structured(regex="((((x{1000}){1000}){1000}){1000})"),
    "many stars": _structured(regex="(a*)*" * 20_000),
    "a grammar of stars": _structured(grammar=STARS),
    "a long chain of rules": _structured(grammar="start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(15_000))),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_honoured_is_refused_in_time(wide: Served, name: str) -> None:
    path, body = HOSTILE[name]
    with _Watch(wide) as watch:
        began = time.monotonic()
        status, answer = _post(wide, path, body)
        took = time.monotonic() - began
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert len(json.dumps(answer)) < 5000
    assert took < 5
    assert max(watch.seconds) < HEALTH_S


def test_a_long_chain_of_definitions_costs_no_process(wide: Served) -> None:
    """llguidance recurses along it."""
    assert _post(wide, *_structured(json=_chain(1000)))[0] == 200
    assert _post(wide, *_structured(json=json.dumps(_chain(800))))[0] in (200, 400)


def test_many_at_once_are_honoured(wide: Served) -> None:
    with _Watch(wide) as watch:
        for given in (
            {"n": 1024},
            {"prompt": ["a b c"] * 2000},
            {"stop": ["z" * 10_000] * 100},
            {"prompt": ["a"] * 500, "bad_words": [f"{i} {'xyz ' * 60}" for i in range(1024)]},
        ):
            path, body = _prompt(**given)
            status, answer = _post(wide, path, body)
            assert status == 200, answer
        status, answer = _post(wide, "/v1/embeddings", {"input": ["ab cd " * 660] * 2048})
        assert status == 200, answer
    assert max(watch.seconds) < HEALTH_S


def test_a_body_that_says_that_it_is_too_large_is_refused_unread(wide: Served) -> None:
    with _connect(wide) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


def test_who_asks_before_a_body_that_is_too_large_is_told_not_to_send_it(wide: Served) -> None:
    with _connect(wide) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\nExpect: 100-continue\r\n\r\n"
        client.sendall(head)
        answer = client.makefile("rb").read()
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"100 Continue" not in answer


def test_who_sends_100_megabytes_gets_to_know_why_not(wide: Served) -> None:
    with _Watch(wide) as watch:
        assert _post(wide, COMPLETIONS, b" " * 100_000_000)[0] == 413
    assert max(watch.seconds) < HEALTH_S


def test_chunks_add_up_to_a_body_that_is_too_large(wide: Served) -> None:
    connection = http.client.HTTPConnection(urlsplit(wide.url).netloc, timeout=60)
    connection.request("POST", COMPLETIONS, iter([b" " * 1_000_000] * 20), encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize(
    "slow",
    [
        b"",
        b"\r\n",
        b"GET /hea",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /hea",
        b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nPOST /tokenize HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nUpgrade: h2c\r\nConnection: upgrade\r\nContent-Length: 9\r\n\r\n",
    ],
    ids=["nothing", "an empty line", "a head", "a second", "half of it", "its body", "a body", "chunks", "an upgrade"],
)
def test_a_connection_on_which_no_request_comes_ends(wide: Served, slow: bytes) -> None:
    began = time.monotonic()
    with _connect(wide) as client:
        client.sendall(slow)
        try:
            while client.recv(1000):
                pass
        except ConnectionResetError:
            pass
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(
    "endless",
    [
        (b"GET /", b"a" * 1000),
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n" * 100),
        (b"GET / HTTP/1.1\r\na: ", b"b" * 1000),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 100),
    ],
    ids=["path", "headers", "header", "trailers"],
)
def test_a_head_without_an_end_is_refused(wide: Served, endless: tuple[bytes, bytes]) -> None:
    first, more = endless
    with _connect(wide) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.sendall(first)
        for _ in range(100_000):
            client.sendall(more)


def test_a_body_without_an_end_is_not_taken_for_ever(wide: Served) -> None:
    with _connect(wide) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 413")
        for _ in range(300):
            client.sendall(b" " * 1_000_000)


def test_requests_without_an_end_are_not_taken_before_their_turn(wide: Served) -> None:
    with _connect(wide) as client, pytest.raises((BrokenPipeError, ConnectionResetError)):
        reader = threading.Thread(target=_read_all, args=(client,))
        reader.start()
        try:
            for _ in range(100):
                client.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n" * 1000)
        finally:
            with suppress(OSError):
                client.shutdown(socket.SHUT_WR)
            reader.join()


def _read_all(client: socket.socket) -> None:
    with suppress(ConnectionResetError):
        while client.recv(1 << 20):
            pass


def test_who_leaves_with_another_request_on_the_way_has_left(wide: Served) -> None:
    before = _metric(wide, "generation_tokens_total")
    with _connect(wide) as client:
        client.sendall(_endless(stream=False) + b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        limit = time.monotonic() + 60
        while not _metric(wide, "num_requests_running"):
            assert time.monotonic() < limit
    while _metric(wide, "num_requests_running"):
        assert time.monotonic() < limit
    assert _metric(wide, "generation_tokens_total") - before < 500_000


def test_an_answer_that_nobody_reads_ends_its_request(wide: Served) -> None:
    with _connect(wide) as client, _Watch(wide) as watch:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.sendall(_endless(stream=True))
        limit = time.monotonic() + 60
        while not _metric(wide, "num_requests_running"):
            assert time.monotonic() < limit
        while _metric(wide, "num_requests_running"):
            assert time.monotonic() < limit
    assert statistics.median(watch.seconds) < HEALTH_S


def _metric(server: Served, name: str) -> float:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"headway:{name}"))


def _said(server: Served, request: bytes) -> bytes:
    """All that the server says until it closes, or is silent."""
    with _connect(server) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read()


def test_pipelined_requests_are_answered_in_their_order(wide: Served) -> None:
    paths = ["/health", "/version", "/nope", "/health"]
    heads = [f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n" for path in paths]
    heads[-1] = heads[-1].replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n")
    with _connect(wide) as client:
        client.sendall("".join(heads).encode())
        answers = client.makefile("rb").read()
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"200", b"404", b"200"]


@pytest.mark.parametrize(
    "head",
    [
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Length : 1\r\n\r\na",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\nbad header\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(wide: Served, head: bytes) -> None:
    assert _said(wide, head).split(b"\r\n")[0] in (b"HTTP/1.1 400 Bad Request", b"")


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "DELETE", "PATCH", "PURGE"])
@pytest.mark.parametrize("host", ["a", "[", "a b", "\x7f", "a" * 10_000])
def test_other_methods_and_hosts_are_no_failures(wide: Served, method: str, host: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(wide.url).netloc, timeout=60)
    for path in ("/health", "/nope", "/health/", CHAT, "/%00", "//", "/v1/models?" + "a" * 10_000):
        connection.putrequest(method, path, skip_host=True)
        connection._output(f"Host: {host}".encode())  # type: ignore[attr-defined]  # putheader checks it
        connection.endheaders()
        answer = connection.getresponse()
        answer.read()
        assert answer.status < 500, (path, answer.status)
    connection.close()
