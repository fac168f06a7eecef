"""A model of seconds."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny(tiny_opt: Path) -> list[str]:
    """Options of a model whose weights are random."""
    return ["--model", str(tiny_opt), "--load-format", "dummy", "--threads", "1", "--kv-cache-memory-bytes", "10000000"]
