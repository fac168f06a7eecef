"""Offline jobs over datasets. Importing this loads neither torch nor Ray."""

from headway.batch.config import (
    ChatTemplateStageConfig,
    DetokenizeStageConfig,
    EngineProcessorConfig,
    HttpRequestProcessorConfig,
    HttpRequestStageConfig,
    ProcessorConfig,
    ServeDeploymentProcessorConfig,
    StageConfig,
    TokenizerStageConfig,
)
from headway.batch.processor import Processor, build_processor

__all__ = [
    "ChatTemplateStageConfig",
    "DetokenizeStageConfig",
    "EngineProcessorConfig",
    "HttpRequestProcessorConfig",
    "HttpRequestStageConfig",
    "Processor",
    "ProcessorConfig",
    "ServeDeploymentProcessorConfig",
    "StageConfig",
    "TokenizerStageConfig",
    "build_processor",
]
