"""Random weights of published shapes: everything but the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headway import LLM, SamplingParams
from headway.errors import ConfigError, ModelError, RequestError
from headway.models.describe import describe
from headway.models.source import published_shapes, resolve_source

SMALL = {"kv_cache_memory_bytes": 100_000_000, "max_model_len": 128}
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A directory with nothing but a configuration, small."""
    config = json.loads((published_shapes()["facebook/opt-125m"] / "config.json").read_text())
    config |= {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 2, "ffn_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "vocab_size": 500}))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "layers", "hidden_size", "labels", "millions"),
    [
        ("facebook/opt-125m", 12, 768, 0, 125),
        ("facebook/opt-350m", 24, 1024, 0, 331),
        ("facebook/opt-1.3b", 24, 2048, 0, 1316),
        ("HuggingFaceTB/fineweb-edu-classifier", 12, 768, 1, 109),
        ("cross-encoder/ms-marco-MiniLM-L-6-v2", 6, 384, 1, 22.7),
    ],
)
def test_published_shapes_need_no_files(name: str, layers: int, hidden_size: int, labels: int, millions: float) -> None:
    facts = describe(resolve_source(name, load_format="dummy"))
    assert (facts.num_layers, facts.hidden_size, facts.num_labels) == (layers, hidden_size, labels)
    assert facts.num_parameters == pytest.approx(millions * 1e6, rel=0.1)


def test_token_ids_run_and_a_seed_repeats(config_only: Path) -> None:
    tokens: list[list[int]] = []
    for seed in (1, 1, 2):
        with LLM(str(config_only), load_format="dummy", seed=seed, **SMALL) as llm:
            (output,) = llm.generate([[5, 6, 7]], GREEDY)
            assert output.outputs[0].text == ""
            tokens.append(output.outputs[0].token_ids)
    assert len(tokens[0]) == 4
    assert tokens[0] == tokens[1] != tokens[2]


def test_text_is_refused_with_a_reason(config_only: Path) -> None:
    with LLM(str(config_only), load_format="dummy", **SMALL) as llm:
        with pytest.raises(RequestError, match=r"prompt='Hello': .* no tokenizer: give token ids"):
            llm.generate("Hello", GREEDY)
        assert len(llm.generate([5], GREEDY)[0].outputs[0].token_ids) == 4


def test_a_classifier_gives_a_number() -> None:
    with LLM("cross-encoder/ms-marco-MiniLM-L-6-v2", load_format="dummy") as llm:
        first, second = llm.classify([[101, 5, 6, 102], [101, 9, 102]])
        assert len(first.data) == len(second.data) == 1
        assert first.data != second.data


def test_without_dummy_weights_a_tokenizer_and_weights_are_needed(config_only: Path) -> None:
    with pytest.raises(ModelError, match=r"has neither model\.safetensors"):
        LLM(str(config_only), **SMALL)


@pytest.mark.parametrize("settings", [{"ops": "cpu"}, {"ops": "reference"}, {"distributed_executor_backend": "mp"}])
def test_a_cache_that_no_machine_has_the_memory_for_names_its_setting(
    settings: dict[str, str], config_only: Path
) -> None:
    asked = {"kv_cache_memory_bytes": 1 << 50, **settings}
    with pytest.raises(ConfigError, match=r"kv_cache_memory_bytes='\d+ blocks': rank 0 cannot have so much memory"):
        LLM(str(config_only), load_format="dummy", max_model_len=128, **asked)
