"""The resolved settings, one frozen dataclass per owner. No field is automatic here: resolve() has decided all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from headway.config.placement import Bundle, Strategy

Dtype = Literal["bfloat16", "float16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A resolved setting: its value, and why it has it."""

    name: str
    value: object
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """path: a local Hugging Face directory or a .gguf file. load_format: "auto" or "dummy" (random weights)."""

    path: str
    served_model_name: str
    dtype: Dtype = "bfloat16"
    max_model_len: int = 2048
    quantization: Literal["int8"] | None = None
    load_format: Literal["auto", "dummy"] = "auto"
    runner: Literal["generate", "pooling"] = "generate"
    trust_remote_code: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """block_size: tokens a block. num_blocks: blocks in the pool (block 0 is never given out: it is the padding)."""

    block_size: int = 16
    num_blocks: int = 0
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """depth 1 is async scheduling: step N+1 is planned and submitted while N runs.

    optimize_for: "latency" bounds what prompts add to a step that others wait for: see Scheduler.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    policy: Literal["fcfs", "priority"] = "fcfs"
    enable_chunked_prefill: bool = True
    depth: Literal[0, 1] = 1
    optimize_for: Literal["throughput", "latency"] = "throughput"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """executor: a name of headway.executor, or an import path "module:Class". stage_layers: of each pipeline stage;
    empty: divided evenly. data_parallel_size: engines of that kind, each in processes of its own where there are
    several. data_parallel_size_local: so many, and no more, are on the node of data_parallel_address (None: this one);
    None: they are where there is room.

    start_timeout_s, step_timeout_s: how long ranks in other processes may take to load (or for another call)
    and for one step; 0: any time.
    """

    executor: str = "uni"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    data_parallel_backend: Literal["mp", "ray"] = "mp"
    data_parallel_size_local: int | None = None
    data_parallel_address: str | None = None
    stage_layers: tuple[int, ...] = ()
    start_timeout_s: float = 600.0
    step_timeout_s: float = 300.0

    @property
    def ranks(self) -> int:
        """Of one engine."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def reporting_rank(self) -> int:
        """The one that has the results: the first of the last pipeline stage."""
        return self.ranks - self.tensor_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RayConfig:
    """address: of the cluster; None: one that runs here, or a new one. bundles: one a rank. timeout_s: to get them.
    node: the ID of the node that they must be on, or after a "!" must not; empty: any.
    """

    address: str | None = None
    bundles: tuple[Bundle, ...] = ({"CPU": 1},)
    strategy: Strategy = "PACK"
    timeout_s: float = 300.0
    node: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceConfig:
    """ops: which kernels ("reference", "cpu", "cuda"); isa: their instruction set on a CPU. threads: of each rank."""

    device: str = "cpu"
    ops: str = "cpu"
    isa: str = "auto"
    threads: int = 1
    enforce_eager: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """trace: the file that a trace of every step is written to."""

    model: ModelConfig
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    trace: str | None = None
    choices: tuple[Choice, ...] = ()
