"""headway runs language models: over datasets, in scripts and in asyncio programs, on any executor."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headway.llm import LLM, AsyncLLM
    from headway.messages import PoolingParams, RequestOutput, SamplingParams, StructuredOutput

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "PoolingParams", "RequestOutput", "SamplingParams", "StructuredOutput", "__version__"]

_HOME = {
    "LLM": "headway.llm",
    "AsyncLLM": "headway.llm",
    "PoolingParams": "headway.messages",
    "RequestOutput": "headway.messages",
    "SamplingParams": "headway.messages",
    "StructuredOutput": "headway.messages",
}


def __getattr__(name: str) -> object:
    """Public names are imported on first use: ``import headway`` loads neither torch nor tokenizers."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'headway' has no attribute {name!r}")
