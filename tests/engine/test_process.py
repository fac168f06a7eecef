"""What an engine's process tells its clients."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.engine.test_async_engine import SlowGrammar, constrained, eventually

from headway.config import CacheConfig, EngineConfig, ModelConfig
from headway.engine import EngineCore, process
from headway.engine.port import Item
from headway.engine.process import EngineService
from headway.engine.replicas import Replicas
from headway.engine.wire import EngineTicket, Status
from headway.executor.fake import FakeExecutor, FakeModel
from headway.llm.frontend import find


async def test_clients_hear_of_a_request_whose_grammar_took_its_time(
    tiny_opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=ModelConfig(path="", served_model_name=""), cache=CacheConfig(num_blocks=500))
    executor, grammar = FakeExecutor(config, FakeModel(latency_s=0.005)), SlowGrammar()
    core = EngineCore(config, executor, executor.start(), grammar)
    monkeypatch.setattr(process, "load", lambda config, facts, tokenizer: (core, None, None))
    monkeypatch.setattr(process, "BEAT_S", 0.01)
    facts = find(str(tiny_opt), load_format="dummy").facts
    service = EngineService(EngineTicket(replica=0, config=config, facts=facts, tokenizer=""))
    ready = service.load()
    running = asyncio.create_task(asyncio.to_thread(service.run))
    replicas = Replicas(1, asyncio.get_running_loop())
    replicas.tell(Status(0, ready.address))
    await asyncio.sleep(0)
    items: asyncio.Queue[Item] = asyncio.Queue()
    request = constrained("r", "x")
    request.max_tokens, request.stream = 2000, False
    replicas.submit([request], lambda _, item: items.put_nowait(item))
    await asyncio.sleep(0.2)  # many beats
    grammar.let.set()
    await eventually(lambda: replicas.metrics().running)
    assert items.empty()
    replicas.close()
    service.stop()
    assert await running is None
