"""Decoders that only transformers implements run on our paged cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.errors import ConfigError, MissingDependencyError, ModelError
from headway.models.describe import describe
from headway.models.spec import Shard

transformers = pytest.importorskip("transformers")

Make = Callable[..., Any]
SETTINGS: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
MODELS = {
    "partial-rotary": ("GPTNeoX", {"rotary_pct": 0.5, "num_key_value_heads": 6}),
    "logit-scale": ("Cohere", {"logit_scale": 0.25}),
    "window": ("Starcoder2", {"sliding_window": 9}),
    "multipliers": ("Granite", {"logits_scaling": 3.0, "attention_multiplier": 0.5}),
    "mixed-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def make_one(cls: str, changes: dict[str, Any]) -> tuple[Any, Path]:
        config = getattr(transformers, f"{cls}Config")(**{**SETTINGS, **changes})
        torch.manual_seed(0)
        model = getattr(transformers, f"{cls}ForCausalLM")(config).eval()
        model.save_pretrained(tmp_path)
        return model, tmp_path

    return make_one


@pytest.mark.parametrize("name", MODELS)
def test_chunked_prefill_and_decode_equal_transformers(
    name: str, make: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    reference, path = make(*MODELS[name])
    run = paged(load(path), prompts)
    rows: dict[int, list[torch.Tensor]] = {seq: [] for seq in range(3)}
    for counts in ({0: 12, 1: 1}, {2: 13, 0: 10}, {0: 1, 2: 1}):
        with torch.inference_mode():
            for seq, logits in run.logits(counts).items():
                rows[seq].append(logits)
    for seq, parts in rows.items():
        with torch.inference_mode():
            expected = reference(torch.tensor([prompts[seq]])).logits[0]
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=1e-4)


def test_facts_of_a_model_only_transformers_has(make: Make) -> None:
    _, path = make("Starcoder2", {})
    facts = describe(path)
    assert (facts.architecture, facts.kind, facts.num_layers) == ("Starcoder2ForCausalLM", "decoder", 2)
    assert (facts.num_kv_heads, facts.head_dim, facts.max_positions) == (2, 8, 128)


def test_random_weights(make: Make, load: Make, paged: Make, prompts: list[list[int]]) -> None:
    _, path = make("Starcoder2", {})
    (path / "model.safetensors").unlink()
    with torch.inference_mode():
        logits = paged(load(path, load_format="dummy"), prompts).logits({0: 5})[0]
    assert torch.isfinite(logits).all()


def test_attention_with_soft_caps_is_refused_at_load(make: Make, load: Make) -> None:
    _, path = make("Gemma2", {"head_dim": 8})
    with pytest.raises(ModelError, match="Gemma2Attention uses attention with softcap, which is not supported"):
        load(path)


def test_attention_that_cannot_be_replaced_is_refused(make: Make, load: Make) -> None:
    _, path = make("Bloom", {"n_head": 6})
    config = json.loads((path / "config.json").read_text())
    config.update(SETTINGS)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="BloomForCausalLM does not take an attention function from outside"):
        load(path)


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_several_ranks_are_refused(kind: str, make: Make, load: Make) -> None:
    _, path = make("Starcoder2", {})
    with pytest.raises(ConfigError, match=f"{kind}_parallel_size=2: must be 1"):
        load(path, Shard(**{f"{kind}_size": 2}))


def test_quantization_is_refused(make: Make, load: Make) -> None:
    _, path = make("Starcoder2", {})
    with pytest.raises(ConfigError, match="quantization='int8': must be none"):
        load(path, quantization="int8")


def test_without_transformers_the_error_names_the_extra(
    make: Make, load: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = make("Starcoder2", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"'starcoder2' is not among .*pip install 'headway\[hf\]'"):
        load(path)
