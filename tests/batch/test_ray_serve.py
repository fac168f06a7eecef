"""Deployments of Ray Serve, ours and others, called for rows; an engine that processors share on Ray."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
pytest.importorskip("ray.data")

from pydantic import BaseModel  # noqa: E402
from tests.batch.processors import MODEL, SAMPLING, SMALL, processor  # noqa: E402
from tests.batch.test_ray_dataset import ask, keep, numbers, rows_of, wait_until  # noqa: E402

from headway.batch import (  # noqa: E402
    Processor,
    ServeDeploymentProcessorConfig,
    build_processor,
)
from headway.batch.serve import build_llm_deployment  # noqa: E402

pytestmark = pytest.mark.usefixtures("ray_here")


class Question(BaseModel):
    n: int


class Answer(BaseModel):
    square: int


@dataclass
class Running:
    now: int = 0
    most: int = 0


@serve.deployment(max_ongoing_requests=4, max_queued_requests=2, ray_actor_options={"num_cpus": 0})
class Squares:
    """A class of a user's."""

    def __init__(self) -> None:
        self.running = Running()

    async def square(self, question: Question) -> Answer:
        self.running.now += 1
        self.running.most = max(self.running.most, self.running.now)
        await asyncio.sleep(0.01)
        self.running.now -= 1
        if question.n == 7:
            raise ValueError("seven is not allowed")
        return Answer(square=question.n**2)

    async def most(self, _: dict[str, Any]) -> int:
        return self.running.most

    async def count(self, request: dict[str, Any]) -> AsyncGenerator[int]:
        for i in range(request["to"]):
            yield i

    async def die_once(self, request: dict[str, Any]) -> str:
        flag = Path(request["flag"])
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    async def stuck(self, _: dict[str, Any]) -> None:
        await asyncio.Event().wait()


@pytest.fixture(scope="module")
def applications(ray_here: None) -> Generator[None]:
    serve.start(proxy_location="Disabled")
    serve.run(Squares.bind(), name="squares", route_prefix=None)
    llm = build_llm_deployment(MODEL, engine_kwargs=SMALL, sampling_params=SAMPLING, max_ongoing_requests=16)
    serve.run(llm, name="llm", route_prefix=None)
    yield
    serve.shutdown()


def calls(method: str, preprocess: Any, app: str = "squares", name: str = "Squares", **settings: Any) -> Processor:
    config = ServeDeploymentProcessorConfig(
        app_name=app, deployment_name=name, should_continue_on_error=True, **settings
    )
    return build_processor(config, lambda row: {"method": method, **preprocess(row)})


@pytest.mark.usefixtures("applications")
def test_a_deployment_is_as_busy_as_it_lets_itself_be_and_errors_are_the_rows() -> None:
    one = calls("square", lambda row: {"request_kwargs": {"n": row["n"]}, "dtype": "Q"}, dtype_mapping={"Q": Question})
    found = rows_of(one(numbers(60)))
    for row in found:
        if row["n"] == 7:
            assert (row["error"]["type"], row["error"]["message"]) == ("ValueError", "seven is not allowed")
        else:
            assert row["square"] == row["n"] ** 2 and row["error"] is None
    handle = serve.get_deployment_handle("Squares", "squares")
    assert handle.most.remote({}).result() == 4


@pytest.mark.usefixtures("applications")
def test_all_items_of_a_stream_come_back() -> None:
    found = rows_of(calls("count", lambda row: {"request_kwargs": {"to": row["n"]}})(numbers(6)))
    assert [row["responses"] for row in found] == [list(range(row["n"])) for row in found]


@pytest.mark.usefixtures("applications")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"method": "nothing", "request_kwargs": {}}, "nothing"),
        ({"request_kwargs": "?"}, "request_kwargs='?': must be an object"),
        ({"request_kwargs": {}, "dtype": "X"}, "dtype='X': must be a key of dtype_mapping"),
        ({"method": "stuck", "request_kwargs": {}}, "no answer within request_timeout_s=0.5"),
    ],
)
def test_what_cannot_be_asked_is_the_rows_error(row: dict[str, Any], message: str) -> None:
    (found,) = calls("square", lambda _: row, request_timeout_s=0.5)(numbers(1)).take_all()
    assert message in found["error"]["message"] and found["error"]["stage"] == "serve_deployment"


@pytest.mark.usefixtures("applications")
def test_a_request_is_sent_again_when_its_replica_dies(tmp_path: Path) -> None:
    one = calls("die_once", lambda _: {"request_kwargs": {"flag": str(tmp_path / "died")}})
    assert [row["response"] for row in one(numbers(8)).take_all()] == ["alive"] * 8


@pytest.mark.usefixtures("applications")
def test_a_deployment_that_is_not_there_is_told() -> None:
    with pytest.raises(Exception, match="deployment_name='Cubes': squares has Squares"):
        calls("square", lambda row: {}, name="Cubes")(numbers(1)).materialize()


@pytest.mark.usefixtures("applications")
def test_our_deployment_answers_as_an_engine_of_the_workers() -> None:
    expected = rows_of(processor(ask, keep)(numbers(12)))
    generate = calls("generate", lambda row: {"request_kwargs": ask(row)}, "llm", "LLM")
    found = rows_of(generate(numbers(12)))
    assert [row["generated_text"] for row in found] == [row["text"] for row in expected]
    body = {"model": "any", "max_tokens": 6, "temperature": 0}
    chat = calls("chat", lambda row: {"request_kwargs": {**ask(row), **body}}, "llm", "LLM")
    texts = {row["n"]: row["choices"][0]["message"]["content"] for row in chat(numbers(7)).take_all()}
    assert texts == {row["id"] + 2: row["text"] for row in expected[:7]}  # the answer's id is now the row's
    completions = calls("completions", lambda row: {"request_kwargs": {"prompt": "One, two,", **body}}, "llm", "LLM")
    (one,) = completions(numbers(1)).take_all()
    assert one["choices"][0]["finish_reason"] == "length" and one["usage"]["completion_tokens"] == 6
    stream = calls("generate_stream", lambda row: {"request_kwargs": ask(row)}, "llm", "LLM")
    (deltas,) = stream(numbers(1)).take_all()
    assert "".join(delta["generated_text"] for delta in deltas["responses"]) == expected[0]["text"]
    (bad,) = calls("chat", lambda row: {"request_kwargs": {"messages": 3}}, "llm", "LLM")(numbers(1)).take_all()
    assert "messages=3" in bad["error"]["message"]


def shared_processors() -> tuple[Processor, Processor]:
    def second_question(row: dict[str, Any]) -> dict[str, Any]:
        turns = [*row["messages"], {"role": "assistant", "content": row["text"]}, {"role": "user", "content": "More"}]
        return {"messages": turns}

    def cached(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "text": row["generated_text"], "cached": row["num_cached_tokens"]}

    def keep_turn(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "n": row["n"], "messages": row["messages"], "text": row["generated_text"]}

    return processor(ask, keep_turn, shared="one"), processor(second_question, cached, shared="one")


def shared_engines() -> list[str]:
    names = ray.util.list_named_actors()
    return [name for name in names if name.startswith("headway-one-")]


def test_chained_processors_share_an_engine_and_its_prefix_cache() -> None:
    first, second = shared_processors()
    dataset = second(first(numbers(8)))
    assert len(shared_engines()) == 1
    found = rows_of(dataset)
    assert all(row["cached"] >= 16 for row in found)
    first.close()
    assert len(shared_engines()) == 1
    second.close()
    wait_until(shared_engines, [])


def test_rows_run_again_when_the_shared_engines_process_is_killed() -> None:
    first, _ = shared_processors()
    with first:
        assert len(rows_of(first(numbers(4)))) == 4
        actor = ray.get_actor(shared_engines()[0])
        pid = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
        os.kill(pid, signal.SIGKILL)
        assert len(rows_of(first(numbers(8)))) == 8
