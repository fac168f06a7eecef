"""An executor without a model that takes its time."""

from __future__ import annotations

from headway.config import EngineConfig
from headway.executor.fake import FakeExecutor, FakeModel

STEP_S = 0.005


class SlowExecutor(FakeExecutor):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, FakeModel(latency_s=STEP_S))
