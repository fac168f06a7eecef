"""Engine processes over TCP, as between nodes."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from msgspec.structs import replace

from headway import AsyncLLM, SamplingParams
from headway.engine.link import Dialer, Listener
from headway.engine.local import LocalRun
from headway.engine.replicas import Replicas
from headway.engine.supervise import Supervisor
from headway.engine.wire import EngineTicket, Status
from headway.errors import EngineDead
from headway.llm.frontend import find
from headway.llm.replicas import Seat

HOST = "127.0.0.2"


async def test_only_who_has_the_key_comes_in_and_only_where_that_was_asked_for() -> None:
    loop, heard = asyncio.get_running_loop(), asyncio.Queue[bytes]()
    listener = Listener(HOST)
    assert listener.address.endpoint.startswith(f"tcp://{HOST}:")
    listener.open(lambda client, data: heard.put_nowait(client + data))
    public, secret = zmq.curve_keypair()
    stranger = Dialer(loop, replace(listener.address, public_key=public, secret_key=secret), print, list)
    stranger.send(b"hello")
    friend = Dialer(loop, listener.address, print, list)
    friend.send(b"first")
    message = await asyncio.wait_for(heard.get(), 5)
    assert message.endswith(b"first") and heard.empty()
    assert listener.send(message[: -len(b"first")], b"back")
    friend.close()
    while listener.send(message[: -len(b"first")], b"back"):
        await asyncio.sleep(0.01)
    stranger.close()
    listener.close()


class Proxy:
    """Between a client and an engine; can cut their connections."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").partition(":")
        self._target = host, int(port)
        self._writers: list[asyncio.StreamWriter] = []

    async def open(self) -> str:
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers = []

    async def close(self) -> None:
        self.server.close()
        self.cut()
        await self.server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, here = await asyncio.open_connection(*self._target)
        self._writers += [writer, here]
        await asyncio.gather(self._pass(reader, here), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()


async def test_a_connection_that_was_lost_fails_what_streams_and_comes_back(
    tiny_opt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "faults")
    found = find(
        str(tiny_opt), load_format="dummy", max_model_len=512, distributed_executor_backend="slow:SlowExecutor"
    )
    ticket = EngineTicket(
        replica=0, config=found.config, facts=found.facts, tokenizer=found.tokenizer, host="127.0.0.1"
    )
    supervisor = Supervisor(ticket, 1, LocalRun)
    proxy = Proxy(supervisor.ready[0].address.endpoint)
    endpoint = await proxy.open()
    replicas = Replicas(1, asyncio.get_running_loop(), release=supervisor.close)

    def tell(status: Status) -> None:
        assert status.address is not None
        replicas.tell(replace(status, address=replace(status.address, endpoint=endpoint)))

    supervisor.listen(tell)
    await asyncio.sleep(0)
    params = SamplingParams(max_tokens=400, ignore_eos=True)
    async with AsyncLLM.over(Seat(found, supervisor.ready[0].info).frontend(), replicas) as llm:
        stream = llm.generate([1, 2], params)
        await anext(stream)
        proxy.cut()
        with pytest.raises(EngineDead, match="replica 0: the connection was lost"):
            async for _ in stream:
                pass
        while not llm.health()[0].up:
            await asyncio.sleep(0.01)
        while llm.metrics().running:  # the engine has noticed that nobody waits for it
            await asyncio.sleep(0.01)
        tokens = [t async for d in llm.generate([1, 2], replace(params, max_tokens=8)) for t in d.outputs[0].token_ids]
        assert len(tokens) == 8
    await proxy.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("headway-supervise")]
