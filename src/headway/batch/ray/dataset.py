"""A processor as operators of a Ray dataset: one, but for the steps that were given workers of their own."""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from headway.batch.config import Concurrency, EngineProcessorConfig, ProcessorConfig
from headway.batch.engines import Lease
from headway.batch.ray.resources import engine_resources, engine_settings
from headway.batch.specs import EngineSpec, FunctionSpec, Spec
from headway.config.resolve import MAX_NUM_SEQS
from headway.errors import MissingDependencyError

try:
    from ray.data import ActorPoolStrategy, Dataset

    from headway.batch.ray.admission import Makes
    from headway.batch.ray.shared import MAX_TASK_RETRIES, shared
    from headway.batch.ray.workers import FlowWorker, FunctionWorker, Work
except ImportError as missing:
    raise MissingDependencyError("datasets need Ray Data: pip install 'headway[ray]'") from missing

CONCURRENT_BATCHES = 8
_TAKES_ANY = "ray_remote_args" in inspect.signature(Dataset.map_batches).parameters  # Ray means to end that
_NAMES_CALLS = (
    "max_concurrent_calls_per_actor" in inspect.signature(ActorPoolStrategy).parameters
)  # else an option of the actor


def apply(dataset: Dataset, config: ProcessorConfig, specs: Sequence[Spec], leases: Mapping[int, Lease]) -> Dataset:
    """Lazily. leases: on the engines of the specs of that id; a shared engine's actor is made at once."""
    gc.collect()  # a dataset that failed is a cycle, in which it holds its workers and what they have reserved
    engine = next((spec for spec in specs if isinstance(spec, EngineSpec)), None)
    reserved = {} if engine is None else engine_resources(engine.settings, engine.config)
    groups = _operators([_placed(spec, leases, reserved) for spec in specs])
    for i, group in enumerate(groups):
        work = Work(
            specs=group,
            last=i == len(groups) - 1,
            continues=config.should_continue_on_error,
            own_threads=_own_threads(config),
        )
        head = next(spec for spec in group if _leads(spec))
        operator = _functions(head, config) if isinstance(head, FunctionSpec) else _flow(head, config, reserved)
        dataset = operator.add(dataset, work)
    return dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operator:
    """batch_size: the least rows of a task. calls: tasks that a worker runs at a time. queued: that it is given."""

    worker: type[Any]
    batch_size: int
    workers: Concurrency
    resources: dict[str, Any]
    calls: int = 1
    queued: int | None = None

    def add(self, dataset: Dataset, work: Work) -> Dataset:
        least, most = (self.workers, self.workers) if isinstance(self.workers, int) else self.workers
        pool: dict[str, Any] = {"min_size": least, "max_size": most, "max_tasks_in_flight_per_actor": self.queued}
        arguments = {name: value for name, value in self.resources.items() if value is not None}
        if _TAKES_ANY:
            arguments["max_task_retries"] = MAX_TASK_RETRIES
        arguments.setdefault("runtime_env", {})  # any: what comes before then keeps tasks of its own, on every CPU
        (pool if _NAMES_CALLS else arguments)[
            "max_concurrent_calls_per_actor" if _NAMES_CALLS else "max_concurrency"
        ] = self.calls
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of options that map_batches does not name
            return dataset.map_batches(
                self.worker,
                fn_constructor_kwargs={"work": work},
                batch_size=self.batch_size,
                batch_format="pyarrow",
                compute=ActorPoolStrategy(**pool),
                **arguments,
            )


def _operators(specs: Sequence[Makes]) -> list[list[Makes]]:
    """What has no workers of its own runs in those of the step before it; the first ones, in those of the next."""
    groups: list[list[Makes]] = [[]]
    for spec in specs:
        if _leads(spec) and any(_leads(other) for other in groups[-1]):
            groups.append([])
        groups[-1].append(spec)
    return groups


def _leads(spec: Makes) -> bool:
    return not isinstance(spec, FunctionSpec) or spec.workers.separate


def _placed(spec: Spec, leases: Mapping[int, Lease], reserved: dict[str, Any]) -> Makes:
    """An engine's executor decided, or the engine that is shared."""
    if not isinstance(spec, EngineSpec):
        return spec
    config = spec.config
    scales = config.shared is None and not isinstance(config.concurrency, int)
    placed = replace(spec, settings=engine_settings(spec.settings, config.accelerator_type, scales))
    if config.shared is None:
        return placed
    return shared(placed, leases[id(spec)], reserved, _own_threads(config))


def _functions(head: FunctionSpec, config: ProcessorConfig) -> _Operator:
    workers = head.workers
    resources = {
        "num_cpus": 1 if workers.num_cpus is None else workers.num_cpus,
        "memory": workers.memory,
        "runtime_env": workers.runtime_env or getattr(config, "runtime_env", None),
    }
    return _Operator(
        worker=FunctionWorker,
        batch_size=workers.batch_size or config.batch_size,
        workers=workers.concurrency or config.concurrency,
        resources=resources,
    )


def _flow(head: Makes, config: ProcessorConfig, engine: dict[str, Any]) -> _Operator:
    """Several batches in every worker, so that the rows of a new one enter as those of another one leave.

    A task runs four batches of a block at a time, and as many tasks run as there are concurrent batches: with batches
    of what the engine runs at a time, it is full with small blocks as with a single large one. One worker alone
    gets twice that, for rows that take much longer than others; several share the rows.
    """
    size = config.batch_size
    if isinstance(config, EngineProcessorConfig):
        alone = config.concurrency in (1, (1, 1))
        size = max(size, (config.engine_kwargs.get("max_num_seqs") or MAX_NUM_SEQS) * (2 if alone else 1))
    calls = getattr(config, "max_concurrent_batches", None) or CONCURRENT_BATCHES
    return _Operator(
        worker=FlowWorker,
        batch_size=head.workers.batch_size or size,
        workers=config.concurrency,
        resources=engine if isinstance(head, EngineSpec) else _light_resources(head, config),
        calls=calls,
        queued=getattr(config, "max_tasks_in_flight_per_actor", None) or 2 * calls,
    )


def _light_resources(head: Makes, config: ProcessorConfig) -> dict[str, Any]:
    workers = head.workers  # of steps that wait for others, and so need next to nothing of this machine
    runtime_env = workers.runtime_env or getattr(config, "runtime_env", None)
    return {"num_cpus": workers.num_cpus or 0, "memory": workers.memory, "runtime_env": runtime_env}


def _own_threads(config: ProcessorConfig) -> bool:
    environment = getattr(config, "runtime_env", None) or {}
    return "OMP_NUM_THREADS" in environment.get("env_vars", {})
