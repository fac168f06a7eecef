"""LLM and AsyncLLM: text in, text out. Importing this loads neither torch nor transformers; starting a model does."""

from headway.llm.async_llm import AsyncLLM
from headway.llm.frontend import Frontend, start
from headway.llm.llm import LLM
from headway.llm.prompts import Prompt, PromptInput

__all__ = ["LLM", "AsyncLLM", "Frontend", "Prompt", "PromptInput", "start"]
