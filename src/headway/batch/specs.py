"""The stages of a processor before they run: what they are made from, wherever that will be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

from headway.batch.config import (
    EngineProcessorConfig,
    HttpRequestProcessorConfig,
    ProcessorConfig,
    ServeDeploymentProcessorConfig,
    StageConfig,
)
from headway.batch.engines import Lease
from headway.batch.flow import Stage
from headway.batch.stages import functions
from headway.batch.stages.engine import EngineOptions, EngineStage
from headway.errors import ConfigError

DECISIVE = ("model", "tokenizer", "revision", "runner", "dtype", "quantization", "load_format", "max_model_len", "seed")
"""Settings of an engine that its answers depend on; the others are about how fast they come."""


class Spec(Protocol):
    """workers: its own, if any of its settings is given; else it runs beside its neighbours. Can be pickled."""

    @property
    def name(self) -> str: ...

    @property
    def workers(self) -> StageConfig: ...

    def fingerprint(self) -> dict[str, Any]:
        """What answers depend on."""
        ...

    def make(self) -> Stage: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """about: what the function makes of a row depends on."""

    name: str
    load: Callable[[], functions.OnRows]
    about: Any
    workers: StageConfig = field(default_factory=StageConfig)

    def fingerprint(self) -> dict[str, Any]:
        return {self.name: self.about}

    def make(self) -> Stage:
        most = self.workers.concurrency
        if not self.workers.separate:
            return functions.Inline(self.name, self.load)
        threads = most if isinstance(most, int) else most[1] if most else 1
        return functions.Threaded(self.name, self.load, self.workers.batch_size or 32, threads)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """settings: of AsyncLLM. config: what the rest of the processor's workers are given."""

    settings: dict[str, Any]
    options: EngineOptions
    config: EngineProcessorConfig
    name: Literal["engine"] = "engine"
    workers: StageConfig = field(default_factory=StageConfig)

    def fingerprint(self) -> dict[str, Any]:
        how = self.options
        model = {name: self.settings.get(name) for name in DECISIVE}
        return {**model, "task": how.task, "sampling": how.sampling, "chat_template": how.template}

    def make(self, lease: Lease | None = None) -> EngineStage:
        """lease: on the engine to use; None: this stage's own, which ends with it."""
        return EngineStage(lease or Lease(self.settings, self.config.shared), self.options)


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSpec:
    config: HttpRequestProcessorConfig
    name: Literal["http_request"] = "http_request"

    @property
    def workers(self) -> StageConfig:
        """As many as the processor's concurrency says: the stage's is of the requests in each."""
        return replace(self.config.http_request, concurrency=None)

    def fingerprint(self) -> dict[str, Any]:
        return {"url": self.config.url}

    def make(self) -> Stage:
        from headway.batch.stages.http import HttpStage

        return HttpStage(self.config)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSpec:
    config: ServeDeploymentProcessorConfig
    name: Literal["serve_deployment"] = "serve_deployment"
    workers: StageConfig = field(default_factory=StageConfig)

    def fingerprint(self) -> dict[str, Any]:
        return {"deployment": [self.config.app_name, self.config.deployment_name]}

    def make(self) -> Stage:
        from headway.batch.stages.serve import ServeStage

        return ServeStage(self.config)


def specs_of(config: ProcessorConfig) -> list[Spec]:
    """ConfigError for a config of no known kind."""
    if isinstance(config, EngineProcessorConfig):
        return _engine_specs(config)
    if isinstance(config, HttpRequestProcessorConfig):
        return [HttpSpec(config=config)]
    if isinstance(config, ServeDeploymentProcessorConfig):
        return [ServeSpec(config=config)]
    raise ConfigError("config", type(config).__name__, "must be an Engine-, Serve- or HttpRequestProcessorConfig")


def _engine_specs(config: EngineProcessorConfig) -> list[Spec]:
    template, tokens, text = config.chat_template, config.tokenize, config.detokenize
    render: dict[str, Any] = {"template_kwargs": template.chat_template_kwargs or {}}
    if template.chat_template is not None:
        render["chat_template"] = template.chat_template
    before: list[Spec] = []
    if template.enabled and _apart(template):
        source = template.model_source or config.model_source
        load = partial(_chat_template, source, render)
        before.append(FunctionSpec(name="chat_template", load=load, about=[source, render], workers=template))
    if tokens.enabled and _apart(tokens):
        source = tokens.model_source or config.model_source
        before.append(FunctionSpec(name="tokenize", load=partial(_tokenize, source), about=source, workers=tokens))
    settings = {"model": config.model_source, **config.engine_kwargs}
    if config.placement_group_config is not None:
        settings["placement_group_config"] = config.placement_group_config
    options = EngineOptions(
        task=config.task_type,
        max_pending=config.max_pending_requests,
        sampling=config.sampling_params,
        template=render,
        render=template.enabled and not _apart(template),
        tokenize=tokens.enabled and not _apart(tokens),
    )
    engine = EngineSpec(settings=settings, options=options, config=config)
    after: list[Spec] = []
    if config.task_type == "generate" and text.enabled and _apart(text):
        source = text.model_source or config.model_source
        after.append(FunctionSpec(name="detokenize", load=partial(_detokenize, source), about=source, workers=text))
    return [*before, engine, *after]


def _apart(stage: Any) -> bool:
    return stage.separate or stage.model_source is not None


# Imported where they run: tokenizers are not needed to build a processor.


def _chat_template(source: str, options: dict[str, Any]) -> functions.OnRows:
    from headway.batch.stages import text

    return text.chat_template(source, options)


def _tokenize(source: str) -> functions.OnRows:
    from headway.batch.stages import text

    return text.tokenize(source)


def _detokenize(source: str) -> functions.OnRows:
    from headway.batch.stages import text

    return text.detokenize(source)
