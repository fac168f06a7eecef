"""Traces, as a collector receives them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tests.server.conftest import Served

MODEL = "smollm2-135m-instruct"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Of OTLP over HTTP. spans: what has been sent to it so far. services: by whom."""

    def __init__(self) -> None:
        spans: list[Span] = []
        services = set[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                body = gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    attributes = {one.key: one.value.string_value for one in resource.resource.attributes}
                    services.add(attributes["service.name"])
                    spans.extend(span for scope in resource.scope_spans for span in scope.spans)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.spans, self.services = spans, services
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


def _post(url: str, path: str, body: dict[str, Any], **headers: str) -> int:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as answer:
            answer.read()
            return answer.status
    except HTTPError as error:
        error.close()
        return error.code


def _attributes(span: Span) -> dict[str, Any]:
    values = {one.key: one.value for one in span.attributes}
    found = {key: getattr(value, str(value.WhichOneof("value"))) for key, value in values.items()}
    return {
        key: [one.string_value for one in value.values] if key.endswith("reasons") else value
        for key, value in found.items()
    }


def test_each_request_is_a_span_below_its_callers(collector: Collector) -> None:
    server = Served(MODEL, "--threads", "1", "--otlp-traces-endpoint", collector.url)
    hello = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5, "max_tokens": 5}
    traceparent = f"00-{TRACE}-{PARENT}-01"
    assert _post(server.url, "/v1/chat/completions", {**hello, "stream": True}, traceparent=traceparent) == 200
    ask = {"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "temperature": 1, "ignore_eos": True}
    assert _post(server.url, "/v1/completions", ask) == 200
    assert _post(server.url, "/v1/embeddings", {"input": [1, 2, 3]}) in (200, 400)
    assert _post(server.url, "/v1/chat/completions", {**hello, "foo": 1}) == 400
    assert server.end() == 0, server.log  # and what was not sent yet is sent
    assert collector.services == {"headway"}
    chat, texts, vectors, wrong = collector.spans
    assert [span.name for span in collector.spans] == [
        f"chat {MODEL}",
        f"text_completion {MODEL}",
        f"embeddings {MODEL}",
        f"chat {MODEL}",
    ]
    assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == (TRACE, PARENT)
    assert texts.parent_span_id == b""
    assert chat.kind == Span.SPAN_KIND_SERVER
    told = _attributes(chat)
    first = told.pop("gen_ai.response.time_to_first_chunk")
    assert 0 < first < (chat.end_time_unix_nano - chat.start_time_unix_nano) / 1e9
    assert told.pop("gen_ai.usage.input_tokens") > 5
    assert told.pop("gen_ai.usage.cache_read.input_tokens") >= 0
    assert told.pop("gen_ai.request.top_p") <= 1
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headway",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.model": MODEL,
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ["length"],
        "http.response.status_code": 200,
        "url.path": "/v1/chat/completions",
    }
    assert _attributes(texts)["gen_ai.usage.output_tokens"] == 12
    assert _attributes(texts)["gen_ai.response.finish_reasons"] == ["length"] * 4
    assert "gen_ai.response.time_to_first_chunk" not in _attributes(texts)
    assert _attributes(vectors)["gen_ai.usage.input_tokens"] == 3
    assert _attributes(wrong)["http.response.status_code"] == 400


def test_a_client_that_leaves_has_a_span_too(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine")
    server = Served(MODEL, "--threads", "1", "--api-server-count", "2", "--otlp-traces-endpoint", collector.url)
    connection = HTTPConnection(urlsplit(server.url).netloc)
    body = {"messages": [{"role": "user", "content": "Count."}], "stream": True, "max_tokens": 4000, "ignore_eos": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    answer = connection.getresponse()
    answer.readline()
    answer.close()
    connection.close()
    assert server.end() == 0, server.log
    assert collector.services == {"mine"}
    (span,) = collector.spans
    told = _attributes(span)
    assert 0 < told["gen_ai.usage.output_tokens"] < 4000
    assert told["gen_ai.response.finish_reasons"] == []


def test_without_an_endpoint_nothing_of_it_is_imported() -> None:
    probe = "import sys, headway.server.run\nassert not any(name.startswith('opentelemetry') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    command = [Path(sys.executable).with_name("headway"), "serve", MODEL, "--otlp-traces-endpoint", "localhost:4317"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "otlp_traces_endpoint='localhost:4317'" in done.stderr


def test_a_collector_that_is_gone_disturbs_nobody() -> None:
    server = Served(MODEL, "--threads", "1", "--otlp-traces-endpoint", "http://127.0.0.1:9/v1/traces")
    with ThreadPoolExecutor(4) as pool:
        body = {"prompt": "x", "max_tokens": 2}
        assert list(pool.map(lambda _: _post(server.url, "/v1/completions", body), range(8))) == [200] * 8
    assert server.end() == 0, server.log
