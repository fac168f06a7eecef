"""From a config to a running engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import msgspec

from headway.config import EngineConfig, ModelFacts
from headway.engine.core import EngineCore
from headway.engine.grammar import GrammarBackend
from headway.engine.structured import LLGuidanceBackend, make_grammar
from headway.engine.trace import Trace
from headway.executor import WorkerInfo, make_executor
from headway.tokenizers import Tokenizer, load_tokenizer


def launch(config: EngineConfig, grammar: Callable[[], GrammarBackend] | None = None) -> EngineCore:
    """Starts the executor (which loads the model) and an engine over it, with the number of KV blocks it found.

    grammar: asked once the model is loaded, so that what it needs can be read meanwhile.
    """
    with ExitStack() as undo:
        trace = _open_trace(config)
        if trace is not None:
            undo.callback(trace.close)
        executor = make_executor(config)
        info = executor.start()
        undo.callback(executor.close)
        backend = None if grammar is None else grammar()
        config = _as_started(config, info)
        core = EngineCore(config, executor, _explained(info, config), backend, trace)
        undo.pop_all()
        return core


def load(config: EngineConfig, facts: ModelFacts, tokenizer: str) -> tuple[EngineCore, Tokenizer, LLGuidanceBackend]:
    """launch() with the grammar that the tokenizer's file (or directory) makes; it is read while the model loads."""
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_tokenizer, config, facts, tokenizer)
        core = launch(config, lambda: reading.result()[1])
    return core, *reading.result()


def read_tokenizer(config: EngineConfig, facts: ModelFacts, path: str) -> tuple[Tokenizer, LLGuidanceBackend]:
    tokenizer = load_tokenizer(path, may_lack=config.model.load_format == "dummy")
    return tokenizer, make_grammar(tokenizer, facts)


def _open_trace(config: EngineConfig) -> Trace | None:
    """Where every rank runs an engine, each writes a file of its own."""
    rank = os.environ.get("RANK", "0") if config.parallel.executor == "external_launcher" else "0"
    return None if config.trace is None else Trace(config.trace + (f".rank{rank}" if rank != "0" else ""))


def _as_started(config: EngineConfig, info: WorkerInfo) -> EngineConfig:
    """With the capacity that the workers found."""
    cache = replace(config.cache, num_blocks=info.num_blocks, block_size=info.block_size)
    model = replace(config.model, max_model_len=info.max_model_len or config.model.max_model_len)
    return replace(config, cache=cache, model=model)


def _explained(info: WorkerInfo, config: EngineConfig) -> WorkerInfo:
    reasons = {choice.name: choice.reason for choice in config.choices}
    return msgspec.structs.replace(
        info,
        reason=reasons.get("distributed_executor_backend", "given"),
        ranks=config.parallel.ranks,
        depth=config.scheduler.depth,
    )
