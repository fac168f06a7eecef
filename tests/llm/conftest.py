"""Front ends without a model."""

from __future__ import annotations

from typing import Any

import pytest

from headway.config import CacheConfig, EngineConfig, ModelConfig, ModelFacts, SchedulerConfig
from headway.engine import EngineCore
from headway.engine.structured import make_grammar
from headway.executor.fake import FakeExecutor, FakeModel
from headway.llm import Frontend
from headway.tokenizers import Tokenizer

FACTS = ModelFacts(
    architecture="FakeForCausalLM",
    kind="decoder",
    max_positions=512,
    dtype="bfloat16",
    vocab_size=256,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    hidden_size=16,
)


class FakeFrontends:
    """Starts front ends over the fake executor; the real tokenizer gives its tokens a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(
        self, model: FakeModel | None = None, facts: ModelFacts = FACTS, **scheduler: Any
    ) -> tuple[Frontend, EngineCore]:
        runner = "generate" if facts.kind == "decoder" else "pooling"
        config = EngineConfig(
            model=ModelConfig(path="fake", served_model_name="fake", max_model_len=facts.max_positions, runner=runner),
            cache=CacheConfig(num_blocks=512),
            scheduler=SchedulerConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 1024, **scheduler}),
        )
        executor = FakeExecutor(config, model)
        grammar = make_grammar(self.tokenizer, facts)
        core = EngineCore(config, executor, executor.start(), grammar)
        return Frontend.over(config, core.info, facts, self.tokenizer, grammar), core


@pytest.fixture(scope="session")
def fake(tokenizer: Tokenizer) -> FakeFrontends:
    return FakeFrontends(tokenizer)
