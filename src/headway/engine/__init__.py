"""The loop that joins scheduler and executor, and its asyncio front."""

from headway.engine.async_engine import AsyncEngine
from headway.engine.core import EngineCore
from headway.engine.grammar import GrammarBackend, Matcher
from headway.engine.launch import launch
from headway.scheduler import EngineStats

__all__ = ["AsyncEngine", "EngineCore", "EngineStats", "GrammarBackend", "Matcher", "launch"]
