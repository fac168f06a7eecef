"""Executors for tests of servers: the fake one, with SmolLM2's vocabulary."""

from __future__ import annotations

from headway.config import EngineConfig
from headway.executor.fake import FakeExecutor, FakeModel

VOCAB_SIZE = 49152
STEP_S = 0.02


class Wide(FakeExecutor):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, FakeModel(vocab_size=VOCAB_SIZE))


class Slow(FakeExecutor):
    """Steps take STEP_S."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, FakeModel(vocab_size=VOCAB_SIZE, latency_s=STEP_S))
