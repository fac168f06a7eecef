"""Offline jobs over datasets. Importing this loads next to nothing, building a processor neither torch nor Ray."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from headway.batch.job import JobOptions, Summary
    from headway.batch.processor import Processor, build_processor

__all__ = [
    "ChatTemplateStageConfig",
    "DetokenizeStageConfig",
    "EngineProcessorConfig",
    "HttpRequestProcessorConfig",
    "HttpRequestStageConfig",
    "JobOptions",
    "Processor",
    "ProcessorConfig",
    "ServeDeploymentProcessorConfig",
    "StageConfig",
    "Summary",
    "TokenizerStageConfig",
    "build_processor",
]


def __getattr__(name: str) -> object:
    if name in ("Processor", "build_processor"):
        from headway.batch import processor

        return getattr(processor, name)
    if name in ("JobOptions", "Summary"):
        from headway.batch import job

        return getattr(job, name)
    raise AttributeError(f"module 'headway.batch' has no attribute {name!r}")
