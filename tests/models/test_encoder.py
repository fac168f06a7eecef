"""Encoders equal transformers': hidden states, pooling as declared, classification heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from headway.errors import ModelError, RequestError
from headway.messages import PoolingParams
from headway.models.source import resolve_source

Make = Callable[..., Any]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def forward(model: Any, prompts: list[list[int]], types: list[list[int]] | None = None) -> tuple[Any, torch.Tensor]:
    ids = torch.tensor([i for tokens in prompts for i in tokens], dtype=torch.int32)
    flat = [t for row in types for t in row] if types else [0] * len(ids)
    lengths = torch.tensor([0] + [len(tokens) for tokens in prompts])
    starts = lengths.cumsum(0).to(torch.int32)
    with torch.inference_mode():
        return model.forward(ids, torch.tensor(flat, dtype=torch.int32), starts, int(lengths.max())), starts


def pool(model: Any, prompts: list[list[int]], params: PoolingParams) -> list[torch.Tensor]:
    hidden, starts = forward(model, prompts)
    with torch.inference_mode():
        return model.pool(hidden, starts, [params] * len(prompts))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_hidden_states_of_packed_prompts(name: str, checkpoint: Make, load: Make, prompts: list[list[int]]) -> None:
    reference, path = checkpoint(name, "Model")
    hidden, starts = forward(load(path), prompts)
    for tokens, start in zip(prompts, starts.tolist(), strict=False):
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(hidden[start : start + len(tokens)], expected, **TOLERANCE)


def test_token_types_are_used(checkpoint: Make, load: Make) -> None:
    reference, path = checkpoint("bert", "Model")
    tokens, types = [7, 8, 9, 10, 11], [0, 0, 0, 1, 1]
    hidden, _ = forward(load(path), [tokens], [types])
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens]), token_type_ids=torch.tensor([types])).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_masked_language_checkpoint_serves_as_its_body(
    name: str, checkpoint: Make, load: Make, prompts: list[list[int]]
) -> None:
    reference, path = checkpoint(name, "ForMaskedLM")
    hidden, _ = forward(load(path), prompts[:1])
    with torch.inference_mode():
        expected = reference.base_model(torch.tensor(prompts[:1])).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize("labels", [1, 4])
def test_classification_equals_transformers(
    name: str, labels: int, checkpoint: Make, load: Make, prompts: list[list[int]]
) -> None:
    reference, path = checkpoint(name, "ForSequenceClassification", num_labels=labels)
    model = load(path)
    raw = pool(model, prompts, PoolingParams(task="classify", activation=False))
    default = pool(model, prompts, PoolingParams(task="classify"))
    for seq, tokens in enumerate(prompts):
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(raw[seq], expected, **TOLERANCE)
        torch.testing.assert_close(default[seq], expected.softmax(-1) if labels > 1 else expected, **TOLERANCE)


def test_multi_label_classification_is_a_sigmoid_per_label(checkpoint: Make, load: Make) -> None:
    settings = {"num_labels": 3, "problem_type": "multi_label_classification"}
    reference, path = checkpoint("bert", "ForSequenceClassification", **settings)
    (found,) = pool(load(path), [[7, 8, 9]], PoolingParams(task="classify"))
    with torch.inference_mode():
        torch.testing.assert_close(found, reference(torch.tensor([[7, 8, 9]])).logits[0].sigmoid(), **TOLERANCE)


@pytest.mark.parametrize(("declared", "function"), [(None, torch.sigmoid), ("Identity", torch.clone)])
def test_cross_encoder_scores_one_number(declared: str | None, function: Any, checkpoint: Make, load: Make) -> None:
    reference, path = checkpoint("bert", "ForSequenceClassification", num_labels=1)
    if declared:
        config = json.loads((path / "config.json").read_text())
        config["sbert_ce_default_activation_function"] = f"torch.nn.modules.linear.{declared}"
        (path / "config.json").write_text(json.dumps(config))
    (found,) = pool(load(path), [[7, 8, 9]], PoolingParams(task="score"))
    with torch.inference_mode():
        torch.testing.assert_close(found, function(reference(torch.tensor([[7, 8, 9]])).logits[0]), **TOLERANCE)


def test_score_of_several_labels_is_refused(checkpoint: Make, load: Make) -> None:
    model = load(checkpoint("bert", "ForSequenceClassification", num_labels=2)[1])
    with pytest.raises(RequestError, match="one label, this one has 2"):
        pool(model, [[7, 8]], PoolingParams(task="score"))


def test_classifying_without_a_head_is_refused(checkpoint: Make, load: Make) -> None:
    model = load(checkpoint("bert", "Model")[1])
    with pytest.raises(RequestError, match="no classification head"):
        pool(model, [[7, 8]], PoolingParams(task="classify"))


def declare(path: Path, mode: str, *, normalize: bool) -> None:
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(kinds)]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({mode: True}))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("mode", "reduce"),
    [
        ("pooling_mode_cls_token", lambda h: h[0]),
        ("pooling_mode_mean_tokens", lambda h: h.mean(0)),
        ("pooling_mode_max_tokens", lambda h: h.amax(0)),
        ("pooling_mode_lasttoken", lambda h: h[-1]),
    ],
)
def test_embedding_is_pooled_as_declared(
    mode: str, reduce: Any, normalize: bool, checkpoint: Make, load: Make, prompts: list[list[int]]
) -> None:
    reference, path = checkpoint("bert", "Model")
    declare(path, mode, normalize=normalize)
    for tokens, found in zip(prompts, pool(load(path), prompts, PoolingParams()), strict=True):
        with torch.inference_mode():
            expected = reduce(reference(torch.tensor([tokens])).last_hidden_state[0])
        torch.testing.assert_close(found, F.normalize(expected, dim=0) if normalize else expected, **TOLERANCE)


def test_unknown_pooling_module_is_refused(checkpoint: Make, load: Make) -> None:
    _, path = checkpoint("bert", "Model")
    (path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]')
    with pytest.raises(ModelError, match=r"modules\.json: module Dense"):
        load(path)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.999)])
def test_minilm_embeddings_equal_mean_pooled_transformers(dtype: str, least: float, load: Make) -> None:
    transformers = pytest.importorskip("transformers")
    path = resolve_source("all-minilm-l6-v2")
    reference = transformers.AutoModel.from_pretrained(path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = ["The cat sat.", "Un chat était assis sur le tapis.", "x" * 80, "Bonds fell; " * 30, "?"]
    prompts = [tokenizer(sentence)["input_ids"] for sentence in sentences]
    for tokens, found in zip(prompts, pool(load(path, dtype=dtype), prompts, PoolingParams()), strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens])).last_hidden_state[0].mean(0)
        assert found.norm() == pytest.approx(1, abs=1e-3)
        assert F.cosine_similarity(found, expected, dim=0) >= least
