"""The loop that joins scheduler and executor, and its asyncio front."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.engine.core import EngineCore
from headway.engine.grammar import GrammarBackend, Matcher
from headway.engine.launch import launch
from headway.engine.metrics import EngineMetrics, StepTimes

if TYPE_CHECKING:
    from headway.engine.async_engine import AsyncEngine

__all__ = ["AsyncEngine", "EngineCore", "EngineMetrics", "GrammarBackend", "Matcher", "StepTimes", "launch"]


def __getattr__(name: str) -> object:
    """AsyncEngine is imported on first use: asyncio takes 0.05 s."""
    if name == "AsyncEngine":
        from headway.engine.async_engine import AsyncEngine

        return AsyncEngine
    raise AttributeError(f"module 'headway.engine' has no attribute {name!r}")
