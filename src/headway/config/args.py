"""What a user may set. None means automatic: resolve() decides, and says why."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from headway.config.settings import Dtype
from headway.errors import ConfigError


def setting(
    default: Any = None, *, text: str, short: str = "", low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field that is also a command-line option: its help text, short flag and inclusive range."""
    return field(default=default, metadata={"text": text, "short": short, "low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArgs:
    """Everything a user may set on an engine, under known names. Raises ConfigError on a value out of range."""

    model: str = field(metadata={"text": "a known name, a Hugging Face directory or hub id, or a .gguf file"})
    tokenizer: str | None = setting(text="where the tokenizer comes from, if not from the model")
    revision: str | None = setting(text="branch, tag or commit of a hub id")
    served_model_name: str | None = setting(text="the name the model answers to (default: as given)")
    runner: Literal["generate", "pooling"] | None = setting(text="generate text, or embed and classify")
    dtype: Dtype | None = setting(text="compute type")
    quantization: Literal["int8"] | None = setting(text="weight-only quantisation at load")
    load_format: Literal["auto", "dummy"] | None = setting(text="dummy: random weights")
    max_model_len: int | None = setting(text="longest prompt plus answer, in tokens", low=1)
    trust_remote_code: bool | None = setting(text="run code that comes with a checkpoint")
    seed: int | None = setting(text="seeds requests that bring no seed of their own", low=0)

    block_size: int | None = setting(text="tokens a KV cache block", low=1, high=256)
    kv_cache_memory_bytes: int | None = setting(text="bytes of KV cache, on each rank", low=1)
    gpu_memory_utilization: float | None = setting(
        text="share of the device's free memory to use (on CPU: of main memory)", low=0.01, high=1.0
    )
    enable_prefix_caching: bool | None = setting(text="reuse the KV cache of common prefixes")

    max_num_seqs: int | None = setting(text="requests that run at a time", low=1)
    max_num_batched_tokens: int | None = setting(text="tokens a step", low=1)
    enable_chunked_prefill: bool | None = setting(text="cut long prompts into pieces that share steps with decodes")
    optimize_for: Literal["throughput", "latency"] | None = setting(
        text="latency: prompts make a step at most about twice as long for those whose answers run (servers' default)"
    )
    scheduling_policy: Literal["fcfs", "priority"] | None = setting(text="order of waiting requests")
    async_scheduling: bool | None = setting(text="plan the next step while the current one runs")

    distributed_executor_backend: str | None = setting(
        text="where the model step runs: auto, uni, mp, ray, external_launcher, or an import path module:Class"
    )
    tensor_parallel_size: int = setting(1, text="ranks that share every layer", short="-tp", low=1)
    pipeline_parallel_size: int = setting(1, text="ranks that split the layers", short="-pp", low=1)
    data_parallel_size: int = setting(1, text="replicas of the engine", short="-dp", low=1)
    data_parallel_backend: Literal["mp", "ray"] | None = setting(text="where the replicas run", short="-dpb")
    data_parallel_size_local: int | None = setting(
        text="ray: replicas on the head node, the others elsewhere (default: any nodes with room)", short="-dpl", low=0
    )
    data_parallel_address: str | None = setting(
        text="ray: name or address of the head node (default: this one)", short="-dpa"
    )
    data_parallel_rpc_port: int | None = setting(text="accepted, not needed", short="-dpp", low=0, high=65535)
    start_timeout_s: float = setting(
        600.0, text="unless uni: how long the ranks may take to load the model (0: any time)", low=0
    )
    step_timeout_s: float = setting(300.0, text="unless uni: how long one step may take (0: any time)", low=0)

    ray_address: str | None = setting(
        text="ray: the cluster to join (default: RAY_ADDRESS, one that runs here, a new one)"
    )
    placement_group_config: dict[str, Any] | None = setting(
        text="ray: bundles or bundle_per_worker, and strategy; on the command line as JSON"
    )
    placement_group_timeout_s: float = setting(300.0, text="ray: how long to wait for resources", low=0)

    device: Literal["cpu"] | None = setting(text="what computes")
    ops: Literal["reference", "cpu"] | None = setting(text="which kernels")
    isa: Literal["avx512bf16", "avx512", "avx2", "portable"] | None = setting(text="instruction set of the cpu kernels")
    threads: int | None = setting(text="compute threads, of each rank", low=1, high=1024)
    enforce_eager: bool | None = setting(text="operation by operation instead of a compiled step")
    trace: str | None = setting(text="write where each step's time went to this file, for ui.perfetto.dev")

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineArgs:
        """As the constructor, but an unknown name is a ConfigError that suggests the nearest known one."""
        check_names(cls, kwargs)
        return cls(**kwargs)


def check_names(owner: type[Any], given: Mapping[str, Any], within: str = "") -> None:
    """ConfigError for the first that is no field of the dataclass, with the nearest one that is. within: says where."""
    known = [f.name for f in fields(owner)]
    for name, value in given.items():
        if name not in known:
            raise ConfigError(within + name, value, "unknown setting" + suggestion(name, known))


def suggestion(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


@dataclass(frozen=True, slots=True)
class Kind:
    """A field's type, taken apart. choices: of a Literal."""

    type: type
    choices: tuple[str, ...] = ()
    optional: bool = False


@cache
def kinds(owner: type) -> dict[str, Kind]:
    """A settings dataclass's fields by name; each is a str, int, float, bool, dict or Literal, or that or None."""
    return {name: _kind(hint) for name, hint in get_type_hints(owner).items()}


def _kind(hint: Any) -> Kind:
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        (hint,) = (a for a in get_args(hint) if a is not type(None))
    if get_origin(hint) is Literal:
        return Kind(str, get_args(hint), optional)
    return Kind(get_origin(hint) or hint, (), optional)


def check_fields(owner: Any) -> None:
    """Checks every field's type, choices and range. Raises ConfigError."""
    for f in fields(owner):
        value, kind = getattr(owner, f.name), kinds(type(owner))[f.name]
        if value is None and kind.optional:
            continue
        accepted = _not_accepted(value, kind, f.metadata.get("low"), f.metadata.get("high"))
        if accepted:
            raise ConfigError(f.name, value, accepted)


def _not_accepted(value: Any, kind: Kind, low: float | None, high: float | None) -> str | None:
    """What would be accepted, if this value is not."""
    if kind.choices:
        return None if value in kind.choices else "must be one of " + ", ".join(kind.choices)
    number = kind.type is float and isinstance(value, int)
    if not (isinstance(value, kind.type) or number) or (isinstance(value, bool) and kind.type is not bool):
        return {
            str: "must be a string",
            int: "must be an integer",
            float: "must be a number",
            bool: "must be true or false",
            dict: "must be a mapping",
        }[kind.type]
    if low is not None and value < low:
        return f"must be at least {low}"
    if high is not None and value > high:
        return f"must be at most {high}"
    return None
