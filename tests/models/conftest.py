"""Tiny random checkpoints made by transformers' own classes, and a driver that steps a model over a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.config.settings import ModelConfig
from headway.models.registry import load_model
from headway.ops import get_ops
from headway.ops.port import AttentionMetadata

transformers = pytest.importorskip("transformers")

_LLAMA: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_ROPE = {"rope_theta": 10000.0, "factor": 4.0}
_OPT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128}
_BERT: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

# name: the class before its head, the configuration
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "llama-tied-biased": (
        "Llama",
        {**_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
    ),
    "llama-rope-linear": ("Llama", {**_LLAMA, "rope_parameters": {"rope_type": "linear", **_ROPE}}),
    "llama-rope-dynamic": ("Llama", {**_LLAMA, "rope_parameters": {"rope_type": "dynamic", **_ROPE}}),
    "llama-rope-llama3": (
        "Llama",
        {
            **_LLAMA,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "llama3",
                **_ROPE,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-rope-yarn": (
        "Llama",
        {
            **_LLAMA,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "yarn", **_ROPE, "original_max_position_embeddings": 32},
        },
    ),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 9}),
    "qwen2": ("Qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {**_LLAMA, "head_dim": 16}),
    "opt": ("OPT", _OPT),
    "opt-350m": ("OPT", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "gpt2": ("GPT2", _GPT2),
}
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _BERT),
    "roberta": ("Roberta", {**_BERT, "type_vocab_size": 1, "pad_token_id": 1}),
}


def _make(name: str, head: str, **changes: Any) -> Any:
    """A random transformers model; norms and biases are random too, so that none can be forgotten."""
    cls, settings = {**DECODERS, **ENCODERS}[name]
    if cls == "GPT2" and head == "ForCausalLM":
        head = "LMHeadModel"
    config = getattr(transformers, f"{cls}Config")(**{**settings, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, cls + head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """checkpoint(name, head="ForCausalLM", **config) -> (transformers model, its directory)."""

    def make(name: str, head: str = "ForCausalLM", **changes: Any) -> tuple[Any, Path]:
        model = _make(name, head, **changes)
        path = tmp_path / f"{name}-{head}"
        model.save_pretrained(path)
        return model, path

    return make


@pytest.fixture
def load() -> Callable[..., Any]:
    """load(path, **ModelConfig fields) -> the model, float32 on the reference kernels."""

    def load_one(path: Path, shard: Any = None, comm: Any = None, **fields: Any) -> Any:
        settings = {"dtype": "float32", **fields}
        config = ModelConfig(path=str(path), served_model_name="m", **settings)
        return load_model(config, get_ops("reference"), shard, comm)

    return load_one


class PagedRun:
    """Sequences whose blocks lie scattered and interleaved in the cache; step() runs the next tokens of some."""

    def __init__(self, model: Any, sequences: list[list[int]], block_size: int = 4) -> None:
        self.model, self.sequences, self.block_size = model, sequences, block_size
        self.kv = model.allocate_kv(128, block_size)
        self.computed = [0] * len(sequences)
        self.blocks: list[list[int]] = [[] for _ in sequences]
        self.free = list(range(1, 128))[::-1]

    def step(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        """{sequence: tokens to run} -> {sequence: hidden states of those tokens}."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        for seq, count in counts.items():
            span = range(self.computed[seq], self.computed[seq] + count)
            while len(self.blocks[seq]) * self.block_size < span.stop:
                self.blocks[seq].append(self.free.pop())
            ids += self.sequences[seq][span.start : span.stop]
            positions += span
            slots += [self.blocks[seq][p // self.block_size] * self.block_size + p % self.block_size for p in span]
            self.computed[seq] = span.stop
            starts.append(len(ids))
        meta = self._meta(counts, starts, positions, slots)
        with torch.inference_mode():
            hidden = self.model.forward(torch.tensor(ids, dtype=torch.int32), meta, self.kv)
        return {seq: hidden[a:b] for seq, a, b in zip(counts, starts, starts[1:], strict=False)}

    def _meta(
        self, counts: dict[int, int], starts: list[int], positions: list[int], slots: list[int]
    ) -> AttentionMetadata:
        context = [self.computed[seq] for seq in counts]
        width = max(len(self.blocks[seq]) for seq in counts)
        table = [self.blocks[seq] + [0] * (width - len(self.blocks[seq])) for seq in counts]

        def int32(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32)

        return AttentionMetadata(
            query_start=int32(starts),
            context_len=int32(context),
            block_table=int32(table),
            positions=int32(positions),
            slot_mapping=int32(slots),
            max_query=max(counts.values()),
            max_context=max(context),
        )

    def logits(self, counts: dict[int, int]) -> dict[int, torch.Tensor]:
        return {seq: self.model.logits(hidden) for seq, hidden in self.step(counts).items()}

    def greedy(self, num_tokens: int) -> list[list[int]]:
        """All sequences together, a whole prefill and then decode steps; returns what they generated."""
        prompts = [len(tokens) for tokens in self.sequences]
        counts = dict(enumerate(prompts))
        for _ in range(num_tokens):
            for seq, logits in self.logits(counts).items():
                self.sequences[seq].append(int(logits[-1].argmax()))
            counts = dict.fromkeys(counts, 1)
        return [tokens[prompt:] for tokens, prompt in zip(self.sequences, prompts, strict=True)]


@pytest.fixture
def paged() -> type[PagedRun]:
    return PagedRun


@pytest.fixture
def prompts() -> list[list[int]]:
    """Token ids of sequences of different lengths, none a special token."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(5, 131, (n,), generator=generator).tolist() for n in (23, 1, 14, 5)]
