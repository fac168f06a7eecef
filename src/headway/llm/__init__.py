"""LLM and AsyncLLM: text in, text out. Importing this loads neither torch nor transformers; starting a model does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.llm.frontend import Frontend
from headway.llm.llm import LLM
from headway.llm.prompts import Prompt, PromptInput

if TYPE_CHECKING:
    from headway.llm.async_llm import AsyncLLM

__all__ = ["LLM", "AsyncLLM", "Frontend", "Prompt", "PromptInput"]


def __getattr__(name: str) -> object:
    """AsyncLLM is imported on first use: asyncio takes 0.05 s."""
    if name == "AsyncLLM":
        from headway.llm.async_llm import AsyncLLM

        return AsyncLLM
    raise AttributeError(f"module 'headway.llm' has no attribute {name!r}")
