"""What a processor does, under the names that Ray Data LLM gave it. Nothing here imports torch or Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, cast

from headway.batch.params import sampling_params
from headway.config import EngineArgs
from headway.config.args import check_names
from headway.errors import ConfigError

Concurrency = int | tuple[int, int]
S = TypeVar("S", bound="StageConfig")
N = TypeVar("N", bound="_Named")


class _Named:
    """A field that is not known is a ConfigError."""

    __slots__ = ()

    def __new__(cls: type[N], **settings: Any) -> N:
        check_names(cls, settings)
        return object.__new__(cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageConfig(_Named):
    """A step beside the engine. With any of these set it gets workers of its own, and this is what they are given.

    batch_size: rows a call. concurrency: workers (local: threads), or the least and the most of them. num_cpus, memory
    (bytes), runtime_env: of each worker, on Ray.
    """

    enabled: bool = True
    batch_size: int | None = None
    concurrency: Concurrency | None = None
    num_cpus: float | None = None
    memory: float | None = None
    runtime_env: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_counts(self)

    @property
    def separate(self) -> bool:
        return any(getattr(self, f.name) is not None for f in fields(StageConfig) if f.name != "enabled")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerStageConfig(StageConfig):
    """model_source: whose tokenizer, if not the engine's."""

    model_source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeStageConfig(TokenizerStageConfig):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplateStageConfig(TokenizerStageConfig):
    """chat_template: jinja, instead of the model's own. chat_template_kwargs: further variables of the template."""

    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequestStageConfig(StageConfig):
    """concurrency: requests at a time, in each worker (default 64)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig(_Named):
    """batch_size: rows that a worker on Ray is given at a time. concurrency: workers (engines), or least and most."""

    batch_size: int = 32
    concurrency: Concurrency = 1
    accelerator_type: str | None = None
    should_continue_on_error: bool = False

    def __post_init__(self) -> None:
        _check_counts(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProcessorConfig(ProcessorConfig):
    """Rows through an engine. Rows bring messages, prompt or tokenized_prompt, and sampling_params or pooling_params.

    engine_kwargs: see EngineArgs. sampling_params: what rows do not say. shared: the name of an engine that processors
    of this program have in common. max_pending_requests: rows in an engine at a time, running or waiting.
    max_concurrent_batches, max_tasks_in_flight_per_actor: of a worker on Ray. None: as many as keep the engine full.
    """

    model_source: str
    engine_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    task_type: Literal["generate", "embed", "classify", "score"] = "generate"
    sampling_params: dict[str, Any] = field(default_factory=dict[str, Any])
    shared: str | None = None
    runtime_env: dict[str, Any] | None = None
    placement_group_config: dict[str, Any] | None = None
    max_pending_requests: int | None = None
    max_concurrent_batches: int | None = None
    max_tasks_in_flight_per_actor: int | None = None
    chat_template_stage: bool | dict[str, Any] | ChatTemplateStageConfig = True
    tokenize_stage: bool | dict[str, Any] | TokenizerStageConfig = True
    detokenize_stage: bool | dict[str, Any] | DetokenizeStageConfig = True

    def __post_init__(self) -> None:
        _check_counts(self)
        if self.task_type not in ("generate", "embed", "classify", "score"):
            raise ConfigError("task_type", self.task_type, "must be one of generate, embed, classify, score")
        if "model" in self.engine_kwargs:
            raise ConfigError("engine_kwargs", "model", "the model is model_source")
        EngineArgs.from_kwargs(model=self.model_source, **self.engine_kwargs)
        sampling_params(None, self.sampling_params)

    @property
    def chat_template(self) -> ChatTemplateStageConfig:
        return stage_config(ChatTemplateStageConfig, "chat_template_stage", self.chat_template_stage)

    @property
    def tokenize(self) -> TokenizerStageConfig:
        return stage_config(TokenizerStageConfig, "tokenize_stage", self.tokenize_stage)

    @property
    def detokenize(self) -> DetokenizeStageConfig:
        return stage_config(DetokenizeStageConfig, "detokenize_stage", self.detokenize_stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeDeploymentProcessorConfig(ProcessorConfig):
    """Rows through a Ray Serve deployment. Rows bring method, request_kwargs, and maybe dtype, a key of dtype_mapping.

    dtype_mapping: names of the types that requests are built as. request_timeout_s: of one row; None: any time.
    """

    deployment_name: str
    app_name: str = "default"
    dtype_mapping: dict[str, type[Any]] | None = None
    request_timeout_s: float | None = None

    def __post_init__(self) -> None:
        _check_counts(self)
        if self.request_timeout_s is not None and self.request_timeout_s <= 0:
            raise ConfigError("request_timeout_s", self.request_timeout_s, "must be more than 0, or None")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequestProcessorConfig(ProcessorConfig):
    """Rows as POST requests. Rows bring payload; http_response is added.

    qps: requests a second, at most. max_retries: after 408, 429, 5xx and lost connections, with a wait that begins at
    base_retry_wait_time_in_s and doubles. session_factory: makes the aiohttp.ClientSession.
    """

    url: str
    batch_size: int = 64
    headers: dict[str, str] | None = None
    qps: float | None = None
    max_retries: int = 0
    base_retry_wait_time_in_s: float = 1.0
    session_factory: Callable[[], Any] | None = None
    http_request_stage: bool | dict[str, Any] | HttpRequestStageConfig = True

    def __post_init__(self) -> None:
        _check_counts(self)
        if self.qps is not None and self.qps <= 0:
            raise ConfigError("qps", self.qps, "must be more than 0, or None")
        if not self.http_request.enabled:
            raise ConfigError("http_request_stage", self.http_request_stage, "is all that this processor does")

    @property
    def http_request(self) -> HttpRequestStageConfig:
        return stage_config(HttpRequestStageConfig, "http_request_stage", self.http_request_stage)


def stage_config(kind: type[S], name: str, given: object) -> S:
    """From what users may give for a stage: whether, with which settings."""
    if isinstance(given, kind):
        return given
    if isinstance(given, bool):
        return kind(enabled=given)
    if not isinstance(given, Mapping):
        raise ConfigError(name, given, f"must be true, false, a dict or a {kind.__name__}")
    check_names(kind, settings := cast("Mapping[str, Any]", given), f"{name}.")
    return kind(**settings)


def _check_counts(config: Any) -> None:
    for name in ("batch_size", "max_pending_requests", "max_concurrent_batches", "max_tasks_in_flight_per_actor"):
        value = getattr(config, name, None)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(name, value, "must be an integer of at least 1")
    value: Any = config.concurrency
    bounds: Any = (1, value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not (isinstance(config, StageConfig) and value is None) and not (
        isinstance(bounds, (tuple, list))
        and len(cast("list[Any]", bounds)) == 2
        and all(type(n) is int for n in cast("list[Any]", bounds))
        and 1 <= bounds[0] <= bounds[1]
    ):
        raise ConfigError("concurrency", value, "must be a number of at least 1, or (least, most)")
