"""From a config to a running engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from headway.config import EngineConfig
from headway.engine.core import EngineCore
from headway.engine.grammar import GrammarBackend
from headway.engine.trace import Trace
from headway.executor import make_executor


def launch(config: EngineConfig, grammar: Callable[[], GrammarBackend] | None = None) -> EngineCore:
    """Starts the executor (which loads the model) and an engine over it, with the number of KV blocks it found.

    grammar: asked once the model is loaded, so that what it needs can be read meanwhile.
    """
    trace = None if config.trace is None else Trace(config.trace)
    executor = make_executor(config)
    info = executor.start()
    try:
        backend = None if grammar is None else grammar()
    except BaseException:
        executor.close()
        raise
    cache = replace(config.cache, num_blocks=info.num_blocks, block_size=info.block_size)
    return EngineCore(replace(config, cache=cache), executor, info, backend, trace)
