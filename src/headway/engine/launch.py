"""From a config to a running engine."""

from __future__ import annotations

from dataclasses import replace

from headway.config import EngineConfig
from headway.engine.core import EngineCore
from headway.engine.grammar import GrammarBackend
from headway.executor import make_executor


def launch(config: EngineConfig, grammar: GrammarBackend | None = None) -> EngineCore:
    """Starts the executor (which loads the model) and an engine over it, with the number of KV blocks it found."""
    executor = make_executor(config)
    info = executor.start()
    cache = replace(config.cache, num_blocks=info.num_blocks, block_size=info.block_size)
    return EngineCore(replace(config, cache=cache), executor, info, grammar)
