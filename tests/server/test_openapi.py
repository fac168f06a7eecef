"""Requests that schemathesis makes of the OpenAPI document: no 5xx, and answers that are what the document says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.server.conftest import Served

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def _explore(server: Served, place: Path, examples: int, seconds: int) -> None:
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{server.url}/openapi.json"]
    words = ["--checks", CHECKS, "--phases", "examples,fuzzing", "--max-examples", str(examples), "--no-color"]
    more = ["--seed", "1", "--generation-database", "none", "--suppress-health-check", "all"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    command += words + more
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, cwd=place)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_the_document_is_what_the_server_does(wide: Served, tmp_path: Path) -> None:
    _explore(wide, tmp_path, 10, 60)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_document_is_what_the_server_does_at_length(wide: Served, tmp_path: Path) -> None:
    _explore(wide, tmp_path, 1000, 850)
