"""Rows as requests to a Ray Serve deployment, whoever's it is."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec

from headway.batch.config import ServeDeploymentProcessorConfig
from headway.batch.flow import Fail
from headway.batch.row import Row
from headway.batch.stages.concurrent import ConcurrentStage, Entry
from headway.errors import ConfigError, HeadwayError, MissingDependencyError, RequestError

IN_FLIGHT = 64
"""Requests at a time where Serve does not say how many the deployment takes."""
LOOK_S = 5.0
"""How soon another number of replicas is noticed."""
MAX_LOST = 5
"""Replicas that may die over one request."""
BUNDLES = "headway.bundles"
"""In the user_config of a deployment that has answer_rows: of which methods, and how many rows at most a request."""
_WAIT_S, _MAX_WAIT_S = 0.05, 2.0
_STREAMS = "handle.options(stream=True)"


class RequestTimeoutError(HeadwayError):
    """request_timeout_s is over."""


class ServeStage(ConcurrentStage):
    """Rows bring method, request_kwargs and maybe dtype; the answer's fields are added as columns.

    An answer is a dict, a pydantic model, a msgspec struct or a dataclass; anything else becomes the column
    ``response``. Of a method that streams, a single item counts as the answer, and several become the column
    ``responses``, a list of all of them. Requests that the deployment has no room for wait and are sent again; those
    whose replica dies are sent again a few times; everything else that is raised is the row's error. Deployments of
    ours get bundles of rows, which leave one by one.
    """

    name = "serve_deployment"

    def __init__(self, config: ServeDeploymentProcessorConfig) -> None:
        super().__init__()
        self._config = config
        self._most, self._bundled = 1, frozenset[str]()  # rows of a bundle, and their methods
        self._streams: set[str] = set()  # methods

    async def open(self, fail: Fail) -> None:
        """ConfigError if there is no such deployment."""
        try:
            from ray import serve
            from ray.exceptions import ActorDiedError, ActorUnavailableError
            from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
        except ImportError as error:
            raise MissingDependencyError("deployments need Ray Serve: pip install 'headway[ray-serve]'") from error
        await super().open(fail)
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

    async def close(self) -> None:
        if self._limit:
            self._looking.cancel()
        await super().close()

    async def _look(self) -> None:
        """Sends as many as the replicas take: what is more they would refuse, again and again, at their own expense."""
        names = self._config.app_name, self._config.deployment_name
        limit, bundles = await asyncio.to_thread(_capacity, *names)
        self._most, self._bundled = max(1, bundles.get("rows", 1)), frozenset(bundles.get("methods", ()))
        self._resize(limit)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look()

    def _next(self) -> list[Entry]:
        """Bundles are full if so many rows wait: the engine has others meanwhile, and small ones would stay small."""
        entries = super()._next()
        if not self._is_bundled(entries[0][0]):
            return entries
        if min(self._most, 1 + len(self._waiting)) > self._free:
            self._waiting.extendleft(entries)
            return []
        while len(entries) < self._most and self._waiting and self._is_bundled(self._waiting[0][0]):
            entries += super()._next()
        return entries

    def _is_bundled(self, row: Row) -> bool:
        return self._most > 1 and row.data.get("method") in self._bundled

    async def _answer(self, entries: list[Entry]) -> None:
        limit, left, why = self._config.request_timeout_s, dict(enumerate(entries)), None
        try:
            await asyncio.wait_for(self._ask(left), limit)
        except (asyncio.TimeoutError, TimeoutError):
            why = RequestTimeoutError(f"no answer within request_timeout_s={limit}")
        except Exception as error:
            why = getattr(error, "cause", None) or error  # Ray wraps what a deployment raises
        for row, _ in left.values():
            assert why
            row.fail(why, self.name)
        self._leave([*left.values()])

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

    async def _ask(self, left: dict[int, Entry]) -> None:
        """Takes those that are answered out of ``left``."""
        wait, lost = _WAIT_S, 0
        together = len(left) > 1 or self._is_bundled(left[0][0])
        while left:
            try:
                await (self._call_together if together else self._call)(left)
                continue
            except self._full:
                pass
            except self._lost:
                lost += 1
                if lost == MAX_LOST:
                    raise
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, _MAX_WAIT_S)

    async def _call_together(self, left: dict[int, Entry]) -> None:
        requests: dict[int, tuple[str, Any]] = {}
        for i, (row, _) in [*left.items()]:
            try:
                requests[i] = self._request(row.data)
            except Exception as error:
                row.fail(error, self.name)
                self._leave([left.pop(i)])
        numbers = [*requests]
        response = self._handle.options(stream=True).answer_rows.remote([*requests.values()])
        async with _read(response):
            async for answers in response:
                answered = [numbers[i] for i, _, _ in answers]
                for number, (_, columns, error) in zip(answered, answers):
                    row, _ = left[number]
                    row.data.update(columns)
                    row.error = error and dataclasses.replace(error, stage=self.name)
                self._leave([left.pop(number) for number in answered])

    async def _call(self, left: dict[int, Entry]) -> None:
        ((row, _),) = left.values()
        method, request = self._request(row.data)
        row.data.update(await self._columns(method, request))
        self._leave([left.pop(0)])

    async def _columns(self, method: str, request: Any) -> dict[str, Any]:
        if method not in self._streams:
            response = getattr(self._handle, method).remote(request)
            try:
                async with _read(response):
                    return columns(await response)
            except TypeError as error:
                if _STREAMS not in str(error):
                    raise
            self._streams.add(method)  # nothing has run: a generator's body waits for who reads it
        response = getattr(self._handle.options(stream=True), method).remote(request)
        async with _read(response):
            items = [_plain(item) async for item in response]
        return columns(items[0]) if len(items) == 1 else {"responses": items}


def _capacity(app: str, deployment: str) -> tuple[int, dict[str, Any]]:
    """max_ongoing_requests times replicas, and what the deployment says of bundles. Ray's public functions don't."""
    try:
        from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage]

        client: Any = _get_global_client()
        details = client.get_serve_details()["applications"][app]["deployments"][deployment]
        running = sum(replica["state"] == "RUNNING" for replica in details["replicas"])
        config = details["deployment_config"]
        return config["max_ongoing_requests"] * max(1, running), (config.get("user_config") or {}).get(BUNDLES, {})
    except (ImportError, AttributeError, KeyError, TypeError):
        return IN_FLIGHT, {}


@asynccontextmanager
async def _read(response: Any) -> AsyncGenerator[None]:
    """The deployment is told if nobody waits any more."""
    try:
        yield
    except asyncio.CancelledError:
        response.cancel()
        raise


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
