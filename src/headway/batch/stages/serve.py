"""Rows as requests to a Ray Serve deployment, whoever's it is."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar, cast

import msgspec

from headway.batch.config import ServeDeploymentProcessorConfig
from headway.batch.flow import Fail
from headway.batch.row import Done, Row
from headway.errors import ConfigError, HeadwayError, MissingDependencyError, RequestError

T = TypeVar("T")

IN_FLIGHT = 64
"""Requests at a time where Serve does not say how many the deployment takes."""
LOOK_S = 5.0
"""How soon another number of replicas is noticed."""
MAX_LOST = 5
"""Replicas that may die over one request."""
_WAIT_S, _MAX_WAIT_S = 0.05, 2.0
_STREAMS = "handle.options(stream=True)"


class RequestTimeoutError(HeadwayError):
    """request_timeout_s is over."""


class ServeStage:
    """Rows bring method, request_kwargs and maybe dtype; the answer's fields are added as columns.

    An answer is a dict, a pydantic model, a msgspec struct or a dataclass; anything else becomes the column
    ``response``. Of a method that streams, a single item counts as the answer, and several become the column
    ``responses``, a list of all of them. A request that the deployment has no room for waits and is sent again; one
    whose replica dies is sent again a few times; everything else that is raised is the row's error.
    """

    name = "serve_deployment"

    def __init__(self, config: ServeDeploymentProcessorConfig) -> None:
        self._config = config
        self._limit = self._free = 0
        self._waiting: deque[tuple[Row, Done]] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._streams: set[str] = set()  # methods

    async def open(self, fail: Fail) -> None:
        """ConfigError if there is no such deployment."""
        try:
            from ray import serve
            from ray.exceptions import ActorDiedError, ActorUnavailableError
            from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
        except ImportError as error:
            raise MissingDependencyError("deployments need Ray Serve: pip install 'headway[ray-serve]'") from error
        config = self._config
        self._full, self._lost = BackPressureError, (ReplicaUnavailableError, ActorDiedError, ActorUnavailableError)
        applications = (await asyncio.to_thread(serve.status)).applications
        if config.app_name not in applications:
            raise ConfigError("app_name", config.app_name, f"Serve runs {', '.join(applications) or 'no application'}")
        deployments = applications[config.app_name].deployments
        if config.deployment_name not in deployments:
            accepted = f"{config.app_name} has {', '.join(deployments)}"
            raise ConfigError("deployment_name", config.deployment_name, accepted)
        self._handle: Any = serve.get_deployment_handle(config.deployment_name, config.app_name)

        await self._look()
        self._looking = asyncio.get_running_loop().create_task(self._watch())

    @property
    def window(self) -> int:
        return 2 * self._limit

    def submit(self, rows: list[Row], done: Done) -> None:
        self._waiting.extend((row, done) for row in rows)
        self._start()

    async def close(self) -> None:
        self._waiting.clear()
        for task in self._tasks:
            task.cancel()
        if self._limit:
            self._looking.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _look(self) -> None:
        """Sends as many as the replicas take: what is more they would refuse, again and again, at their own expense."""
        limit = await asyncio.to_thread(_capacity, self._config.app_name, self._config.deployment_name)
        self._free += limit - self._limit
        self._limit = limit
        self._start()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    def _start(self) -> None:
        while self._free > 0 and self._waiting:
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._answer(*self._waiting.popleft()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, row: Row, done: Done) -> None:
        limit = self._config.request_timeout_s
        try:
            method, request = self._request(row.data)
            row.data.update(await asyncio.wait_for(self._ask(method, request), limit))
        except (asyncio.TimeoutError, TimeoutError):
            row.fail(RequestTimeoutError(f"no answer within request_timeout_s={limit}"), self.name)
        except Exception as error:
            row.fail(getattr(error, "cause", None) or error, self.name)  # Ray wraps what a deployment raises
        self._free += 1
        done([row])
        self._start()

    def _request(self, data: dict[str, Any]) -> tuple[str, Any]:
        method, request, kind = data.get("method", "__call__"), data.get("request_kwargs"), data.get("dtype")
        if not isinstance(method, str):
            raise RequestError("method", method, "must be the name of a method of the deployment")
        if not isinstance(request, dict):
            raise RequestError("request_kwargs", request, "must be an object")
        if kind is None:
            return method, cast("dict[str, Any]", request)
        kinds = self._config.dtype_mapping or {}
        if kind not in kinds:
            raise RequestError("dtype", kind, f"must be a key of dtype_mapping: {', '.join(kinds) or 'it is empty'}")
        return method, kinds[kind](**request)

    async def _ask(self, method: str, request: Any) -> dict[str, Any]:
        wait, lost = _WAIT_S, 0
        while True:
            try:
                return await self._call(method, request)
            except self._full:
                pass
            except self._lost:
                lost += 1
                if lost == MAX_LOST:
                    raise
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, _MAX_WAIT_S)

    async def _call(self, method: str, request: Any) -> dict[str, Any]:
        if method not in self._streams:
            try:
                return columns(await _unless_cancelled(getattr(self._handle, method).remote(request), _one))
            except TypeError as error:
                if _STREAMS not in str(error):
                    raise
            self._streams.add(method)  # nothing has run: a generator's body waits for who reads it
        streaming = getattr(self._handle.options(stream=True), method)
        items = await _unless_cancelled(streaming.remote(request), _all)
        return columns(items[0]) if len(items) == 1 else {"responses": items}


def _capacity(app: str, deployment: str) -> int:
    """max_ongoing_requests times replicas. Ray's public functions tell the second alone."""
    try:
        from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]

        client: Any = _get_global_client()
        details = client.get_serve_details()["applications"][app]["deployments"][deployment]
        running = sum(replica["state"] == "RUNNING" for replica in details["replicas"])
        return details["deployment_config"]["max_ongoing_requests"] * max(1, running)
    except (ImportError, AttributeError, KeyError, TypeError):
        return IN_FLIGHT


async def _unless_cancelled(response: Any, read: Callable[[Any], Awaitable[T]]) -> T:
    """What it reads. The deployment is told if nobody waits any more."""
    try:
        return await read(response)
    except asyncio.CancelledError:
        response.cancel()
        raise


async def _one(response: Any) -> Any:
    return await response


async def _all(response: Any) -> list[Any]:
    return [_plain(item) async for item in response]


def columns(answer: Any) -> dict[str, Any]:
    plain = _plain(answer)
    return cast("dict[str, Any]", plain) if isinstance(plain, dict) else {"response": plain}


def _plain(answer: Any) -> Any:
    if hasattr(answer, "model_dump"):  # pydantic
        return answer.model_dump()
    if isinstance(answer, msgspec.Struct):
        return msgspec.to_builtins(answer)
    if dataclasses.is_dataclass(answer) and not isinstance(answer, type):
        return dataclasses.asdict(answer)
    return dict(cast("Mapping[str, Any]", answer)) if isinstance(answer, Mapping) else answer
