"""A processor: rows in, rows out, on a Ray dataset or on a file of this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from headway.batch.config import EngineProcessorConfig, ProcessorConfig, StageConfig, stage_config
from headway.batch.engines import Lease
from headway.batch.flow import Flow
from headway.batch.specs import EngineSpec, FunctionSpec, Spec, specs_of
from headway.batch.stages import functions
from headway.batch.stages.engine import EngineCounts, EngineStage
from headway.errors import ConfigError

if TYPE_CHECKING:
    from ray.data import Dataset

    from headway.batch.job import JobOptions, Source, Summary

RowFunction = functions.RowFunction


def build_processor(
    config: ProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
    *,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """preprocess: of a row; what it returns is added to the row. postprocess: what it returns is the output row.

    preprocess_map_kwargs, postprocess_map_kwargs: workers of their own, as StageConfig says. chat_template_kwargs:
    further variables of the chat template.
    """
    if chat_template_kwargs is not None and isinstance(config, EngineProcessorConfig):
        template = replace(config.chat_template, chat_template_kwargs=dict(chat_template_kwargs))
        config = replace(config, chat_template_stage=template)
    specs = specs_of(config)
    if preprocess is not None:
        specs.insert(0, _function("preprocess", functions.preprocess, preprocess, preprocess_map_kwargs))
    if postprocess is not None:
        specs.append(_function("postprocess", functions.postprocess, postprocess, postprocess_map_kwargs))
    return Processor([_Step(config, specs)])


class _Step:
    """What one call of build_processor() made. Its leases on engines end with it."""

    def __init__(self, config: ProcessorConfig, specs: list[Spec]) -> None:
        self.config, self.specs = config, specs
        engines = [spec for spec in specs if isinstance(spec, EngineSpec)]
        self.leases = {id(spec): Lease(spec.settings, spec.config.shared) for spec in engines}


class Processor:
    """Made by build_processor(). Engines start when the first rows come, and run until close().

    Called with a ``ray.data.Dataset`` it gives another one, lazily; run() needs no Ray.
    """

    def __init__(self, steps: list[_Step]) -> None:
        self._steps = steps
        self._counts: list[EngineCounts] = []

    def __call__(self, dataset: Dataset) -> Dataset:
        """Raises MissingDependencyError without the extra ``ray``."""
        from headway.batch.ray.dataset import apply

        for step in self._steps:
            dataset = apply(dataset, step.config, step.specs, step.leases)
        return dataset

    def run(self, source: Source, target: str | Path, options: JobOptions | None = None) -> Summary:
        """Every row of a file, or of an iterable, once through this processor, into a file. See JobOptions."""
        from headway.batch.job import JobOptions, run_job

        return run_job(self, source, target, options or JobOptions())

    def then(self, other: Processor) -> Processor:
        """Both in one pass: a row enters the other one as soon as it leaves this one."""
        return Processor([*self._steps, *other._steps])

    def flow(self) -> Flow:
        """All stages, for the running event loop; engines are those that this processor has leases on."""
        stages = [
            spec.make(step.leases[id(spec)]) if isinstance(spec, EngineSpec) else spec.make()
            for step in self._steps
            for spec in step.specs
        ]
        self._counts += [stage.counts for stage in stages if isinstance(stage, EngineStage)]
        return Flow(stages)

    def counts(self) -> EngineCounts:
        """Of all rows that went through this machine's flows."""
        names = ("prompt_tokens", "output_tokens", "cached_tokens", "restarts")
        return EngineCounts(**{name: sum(getattr(one, name) for one in self._counts) for name in names})

    def fingerprint(self) -> dict[str, Any]:
        """What answers depend on."""
        stages = [(place, spec) for place, step in enumerate(self._steps) for spec in step.specs]
        several = len(self._steps) > 1
        return {
            f"{place}.{name}" if several else name: value
            for place, spec in stages
            for name, value in spec.fingerprint().items()
        }

    @property
    def specs(self) -> list[Spec]:
        return [spec for step in self._steps for spec in step.specs]

    @property
    def should_continue_on_error(self) -> bool:
        return all(step.config.should_continue_on_error for step in self._steps)

    def list_stage_names(self) -> list[str]:
        return [spec.name for spec in self.specs]

    def get_stage_by_name(self, name: str) -> Spec:
        """ConfigError if there is none."""
        for spec in self.specs:
            if spec.name == name:
                return spec
        raise ConfigError("name", name, f"the stages are {', '.join(self.list_stage_names())}")

    def close(self) -> None:
        """Ends engines that no other processor uses; idempotent."""
        for step in self._steps:
            for lease in step.leases.values():
                lease.close()

    def __enter__(self) -> Processor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _function(
    name: str,
    kind: Callable[[RowFunction], functions.OnRows],
    function: RowFunction,
    workers: Mapping[str, Any] | None,
) -> FunctionSpec:
    config = stage_config(StageConfig, f"{name}_map_kwargs", dict(workers or {}))
    return FunctionSpec(name=name, load=partial(kind, function), about=_code(function), workers=config)


def _code(function: Any) -> str:
    """A digest of what a function says, wherever it says it; of anything else that can be called, its type's name."""
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function).__qualname__
    digest = hashlib.blake2b(digest_size=8)
    pending = [code]
    while pending:
        one = pending.pop()
        digest.update(one.co_code + repr(one.co_names).encode())
        for constant in one.co_consts:
            if isinstance(constant, CodeType):
                pending.append(constant)
            else:
                digest.update(repr(constant).encode())
    return digest.hexdigest()
