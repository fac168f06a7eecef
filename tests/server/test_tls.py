"""HTTPS, and clients that need certificates."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import trustme
from tests.server.conftest import Served


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def secure(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("tls")
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(path / "server.pem")
    authority.cert_pem.write_to_path(path / "ca.pem")
    executor = ("--distributed-executor-backend", "tests.server.wide:Wide")
    files = ("--ssl-certfile", str(path / "server.pem"), "--ssl-ca-certs", str(path / "ca.pem"))
    server = Served("smollm2-135m-instruct", *executor, *files)
    assert server.url.startswith("https://")
    yield server
    assert server.end() == 0, server.log


def _context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_a_client_with_a_certificate_is_answered(secure: Served, authority: trustme.CA) -> None:
    context = _context(authority)
    authority.issue_cert("client.example").configure_cert(context)
    body = b'{"prompt": "hi", "max_tokens": 3, "stream": true}'
    with urllib.request.urlopen(f"{secure.url}/v1/completions", body, context=context, timeout=30) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_a_client_without_one_is_not(secure: Served, authority: trustme.CA) -> None:
    _is_refused(secure, _context(authority))


def test_a_certificate_of_somebody_else_is_not_enough(secure: Served, authority: trustme.CA) -> None:
    context = _context(authority)
    trustme.CA().issue_cert("client.example").configure_cert(context)
    _is_refused(secure, context)


def _is_refused(server: Served, context: ssl.SSLContext) -> None:
    with pytest.raises(OSError) as refused:
        urllib.request.urlopen(f"{server.url}/health", context=context, timeout=30)
    assert not isinstance(refused.value, urllib.error.HTTPError), "it was answered"
