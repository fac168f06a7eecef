"""Every decoder family equals transformers' own implementation, however the tokens are cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from headway.config import ParallelConfig
from headway.config.resolve import kv_bytes_per_token
from headway.models.describe import describe

DECODERS = [
    "llama",
    "llama-tied-biased",
    "llama-rope-linear",
    "llama-rope-dynamic",
    "llama-rope-llama3",
    "llama-rope-yarn",
    "mistral",
    "qwen2",
    "qwen2-window",
    "qwen3",
    "opt",
    "opt-350m",
    "gpt2",
]
Make = Callable[..., Any]
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("name", DECODERS)
def test_whole_prefill_of_packed_prompts(
    name: str, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    reference, path = checkpoint(name)
    found = paged(load(path), prompts).logits({seq: len(tokens) for seq, tokens in enumerate(prompts)})
    for seq, tokens in enumerate(prompts):
        torch.testing.assert_close(found[seq], reference_logits(reference, tokens), **TOLERANCE)


@pytest.mark.parametrize("name", DECODERS)
def test_chunked_prefill_mixed_with_decode(
    name: str, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    reference, path = checkpoint(name)
    run = paged(load(path), prompts)
    steps: list[dict[int, int]] = [{0: 7, 1: 1}, {2: 5, 0: 7}, {0: 1, 2: 1, 3: 3}, {3: 1, 2: 8, 0: 8}, {3: 1}]
    rows: dict[int, list[torch.Tensor]] = {seq: [] for seq in range(len(prompts))}
    for counts in steps:
        for seq, logits in run.logits(counts).items():
            rows[seq].append(logits)
    for seq, tokens in enumerate(prompts):
        torch.testing.assert_close(torch.cat(rows[seq]), reference_logits(reference, tokens), **TOLERANCE)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens(name: str, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]) -> None:
    reference, path = checkpoint(name)
    found = paged(load(path), [list(tokens) for tokens in prompts]).greedy(12)
    for tokens, generated in zip(prompts, found, strict=True):
        expected = list(tokens)
        for _ in generated:
            expected.append(int(reference_logits(reference, expected)[-1].argmax()))
        assert generated == expected[len(tokens) :]


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt-350m", "gpt2"])
def test_bfloat16_stays_near_float32(
    name: str, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    reference, path = checkpoint(name)
    found = paged(load(path, dtype="bfloat16"), prompts).logits({0: len(prompts[0])})[0]
    expected = reference_logits(reference, prompts[0])
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_int8_weights_stay_near_float32(checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]) -> None:
    reference, path = checkpoint("llama-tied-biased")
    model = load(path, quantization="int8")
    expected = reference_logits(reference, prompts[0])
    found = paged(model, prompts).logits({0: len(prompts[0])})[0]
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert model.weights_bytes < 0.5 * load(path).weights_bytes


def test_tied_embedding_and_head_are_one(checkpoint: Make, load: Make) -> None:
    tied = load(checkpoint("qwen2")[1])
    apart = load(checkpoint("llama")[1])
    assert tied.embed is tied.head
    assert apart.embed is not apart.head


def test_the_cache_takes_the_bytes_that_the_settings_reckon_with(checkpoint: Make, load: Make) -> None:
    path = checkpoint("qwen3")[1]
    model = load(path)
    per_token = kv_bytes_per_token(describe(path), str(model.dtype).removeprefix("torch."), ParallelConfig())
    assert model.allocate_kv(10, 4).nbytes == 10 * 4 * per_token


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "opt", "gpt2"])
@pytest.mark.parametrize("labels", [1, 3])
def test_classification_head_reads_the_last_token(
    name: str, labels: int, checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    from headway.messages import PoolingParams

    reference, path = checkpoint(name, "ForSequenceClassification", num_labels=labels, pad_token_id=0)
    model = load(path, runner="pooling")
    assert model.num_labels == labels
    run = paged(model, prompts)
    last = torch.stack([h[-1] for h in run.step({seq: len(t) for seq, t in enumerate(prompts)}).values()])
    raw = model.pool(last, [PoolingParams(task="classify", activation=False)] * len(prompts))
    default = model.pool(last, [PoolingParams(task="classify")] * len(prompts))
    for seq, tokens in enumerate(prompts):
        expected = reference_logits(reference, tokens)
        torch.testing.assert_close(raw[seq], expected, **TOLERANCE)
        torch.testing.assert_close(default[seq], expected.softmax(-1) if labels > 1 else expected, **TOLERANCE)


def test_embedding_is_the_last_hidden_state(
    checkpoint: Make, load: Make, paged: Make, prompts: list[list[int]]
) -> None:
    from headway.messages import PoolingParams

    reference, path = checkpoint("llama", "Model")
    model = load(path, runner="pooling")
    last = paged(model, prompts).step({0: len(prompts[0])})[0][-1:]
    with torch.inference_mode():
        expected = reference(torch.tensor(prompts[:1])).last_hidden_state[0, -1]
    (raw,) = model.pool(last, [PoolingParams(normalize=False)])
    (unit,) = model.pool(last, [PoolingParams(dimensions=8)])
    torch.testing.assert_close(raw, expected, **TOLERANCE)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(expected[:8], dim=0), **TOLERANCE)
