"""An executor whose steps take time and no processor."""

from headway.config import EngineConfig
from headway.executor.fake import FakeExecutor, FakeModel


class SlowExecutor(FakeExecutor):
    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, FakeModel(latency_s=0.01))
