"""The one place where automatic settings are decided, each with the reason it got its value."""

from __future__ import annotations

import warnings

from headway.config.args import EngineArgs
from headway.config.choices import Choices, callers_level
from headway.config.facts import ModelFacts
from headway.config.machine import Isa, MachineFacts
from headway.config.parallel import ranks_on_this_node, resolve_parallel
from headway.config.placement import parse_placement
from headway.config.settings import (
    CacheConfig,
    DeviceConfig,
    Dtype,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RayConfig,
    SchedulerConfig,
)
from headway.errors import ConfigError

BLOCK_SIZE = 16
MAX_NUM_SEQS = 256
STEP_TOKENS = 1024
KV_BYTES = 4 << 30
NO_KERNELS = "the compiled kernels are not installed (no C++ compiler?): torch computes, more slowly"
ITEM_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


def resolve(args: EngineArgs, facts: ModelFacts, machine: MachineFacts, path: str | None = None) -> EngineConfig:
    """Every setting of an engine. path: where the model's files lie, if ``args.model`` is a name for them.

    Raises ConfigError naming a setting that cannot be honoured, or that contradicts another.
    """
    choices = Choices(args)
    ops = _ops(choices, machine)
    dtype = _dtype(choices, facts, ops)
    weights = _weights_bytes(args, facts, dtype)
    parallel = resolve_parallel(choices, facts, machine, weights)
    neighbours = ranks_on_this_node(parallel, machine, weights)
    device = _device(choices, machine, ops, neighbours)
    block_size, token_bytes = _block_size(choices), kv_bytes_per_token(facts, dtype, parallel)
    longest = -(-(args.max_model_len or facts.max_positions) // block_size) * block_size * token_bytes
    free = machine.free_memory // neighbours
    budget = _kv_budget(choices, facts, free, neighbours, weights // parallel.ranks, longest)
    if budget < block_size * token_bytes:
        raise _no_room(args, budget, block_size * token_bytes, weights // parallel.ranks, free)
    max_tokens = budget // token_bytes // block_size * block_size if token_bytes else None
    max_model_len = _max_model_len(choices, facts, max_tokens)
    scheduler = _scheduler(choices, facts, max_model_len)
    cache = _cache(choices, facts, block_size, max_model_len, scheduler, max_tokens)
    if token_bytes and args.kv_cache_memory_bytes is None:
        choices.note(
            "kv_cache_memory_bytes",
            (cache.num_blocks - 1) * block_size * token_bytes,
            "what max_num_seqs * max_model_len tokens need, at most "
            + (
                f"a quarter of the free memory and {KV_BYTES >> 30} GiB, at least one request of max_model_len"
                if args.gpu_memory_utilization is None
                else "what gpu_memory_utilization leaves beside the weights"
            )
            + (f"; a rank's share of this node, which {neighbours} ranks divide" if neighbours > 1 else ""),
        )
    choices.note("trace", args.trace, "given" if args.trace else "only where asked for")
    return EngineConfig(
        model=_model(choices, facts, dtype, max_model_len, path),
        cache=cache,
        scheduler=scheduler,
        parallel=parallel,
        device=device,
        ray=_ray(choices, parallel, device.threads),
        trace=args.trace,
        choices=choices.in_order(),
    )


def kv_bytes_per_token(facts: ModelFacts, dtype: Dtype, parallel: ParallelConfig) -> int:
    """Keys and values of one token on the rank that keeps most; 0 for a model without a cache."""
    if not _keeps_cache(facts):
        return 0
    layers = max(parallel.stage_layers, default=facts.num_layers)
    heads = -(-facts.num_kv_heads // parallel.tensor_parallel_size)
    return 2 * layers * heads * facts.head_dim * ITEM_BYTES[dtype]


def _keeps_cache(facts: ModelFacts) -> bool:
    return facts.kind != "encoder" and facts.num_kv_heads > 0


def _ops(choices: Choices, machine: MachineFacts) -> str:
    args = choices.args
    if args.ops == "cpu" and not machine.has_cpu_kernels:
        raise ConfigError("ops", "cpu", "the cpu kernels are not installed (no compiler?); reference is")
    compiled = machine.has_cpu_kernels
    reason = "the compiled kernels are installed" if compiled else "the compiled kernels are not installed"
    if args.ops is None and not compiled:
        warnings.warn(NO_KERNELS, RuntimeWarning, stacklevel=callers_level())
    ops = choices.pick("ops", args.ops, "cpu" if compiled else "reference", reason)
    if args.quantization == "int8" and ops == "reference":
        raise ConfigError("quantization", "int8", "needs the compiled kernels, but ops is reference")
    return ops


def _device(choices: Choices, machine: MachineFacts, ops: str, neighbours: int) -> DeviceConfig:
    """neighbours: ranks that share this node, this one among them."""
    args = choices.args
    gpu = "this version has no GPU kernels" if machine.has_gpu else "no GPU here"
    return DeviceConfig(
        device=choices.pick("device", args.device, "cpu", gpu),
        ops=ops,
        isa=_isa(choices, machine, ops),
        threads=_threads(choices, machine, neighbours),
        enforce_eager=choices.pick("enforce_eager", args.enforce_eager, False, "a compiled step is faster"),
    )


def _ray(choices: Choices, parallel: ParallelConfig, threads: int) -> RayConfig:
    args = choices.args
    replicas = parallel.data_parallel_backend == "ray"
    if parallel.executor != "ray" and not replicas:
        names = ("ray_address", "placement_group_config", "placement_group_timeout_s")
        choices.unused(*names, why=f"the executor is {parallel.executor}")
        return RayConfig()
    given, usual = args.placement_group_config or {}, "STRICT_PACK" if replicas else "PACK"
    bundles, strategy = parse_placement(given, parallel.ranks, {"CPU": float(threads)}, usual)
    asked = {"bundles": list(bundles), "strategy": strategy}
    choices.note("ray_address", args.ray_address, "given" if args.ray_address else "RAY_ADDRESS, or what runs here")
    choices.note("placement_group_config", asked, "given" if args.placement_group_config else "a bundle a rank")
    choices.default("placement_group_timeout_s", "resources may have to be freed first")
    return RayConfig(
        address=args.ray_address, bundles=bundles, strategy=strategy, timeout_s=args.placement_group_timeout_s
    )


def _isa(choices: Choices, machine: MachineFacts, ops: str) -> Isa:
    asked = choices.args.isa
    if asked and ops == "reference":
        raise ConfigError("isa", asked, "is for the cpu kernels, but ops is reference")
    if asked and asked not in machine.isas:
        raise ConfigError("isa", asked, f"this CPU has: {', '.join(machine.isas)}")
    reason = "the best this CPU has" if ops == "cpu" else "not used: the reference kernels leave it to torch"
    return choices.pick("isa", asked, machine.isas[0], reason)


def _threads(choices: Choices, machine: MachineFacts, neighbours: int) -> int:
    # torchrun sets it to 1 where it is not set: that is nobody's choice.
    torchruns = machine.launched is not None and machine.omp_num_threads == 1
    if machine.omp_num_threads is not None and not torchruns:
        return choices.pick("threads", choices.args.threads, machine.omp_num_threads, "OMP_NUM_THREADS is set")
    reason = "every core this process may use (affinity, cgroup quota)"
    if neighbours > 1:
        reason = f"a rank's share of the {machine.cores} cores that {neighbours} ranks may use"
    return choices.pick("threads", choices.args.threads, max(1, machine.cores // neighbours), reason)


def _dtype(choices: Choices, facts: ModelFacts, ops: str) -> Dtype:
    asked = choices.args.dtype
    if asked == "float16" and ops == "cpu":
        raise ConfigError("dtype", asked, "the cpu kernels compute in bfloat16 or float32")
    if not _keeps_cache(facts) and facts.dtype == "float32":
        reason = "a float32 encoder: vectors that others compare keep their precision"
        return choices.pick("dtype", asked, "float32", reason)
    return choices.pick("dtype", asked, "bfloat16", "half the memory traffic of float32, its range")


def _kv_budget(choices: Choices, facts: ModelFacts, free: int, neighbours: int, weights: int, longest: int) -> int:
    """Bytes a rank's KV cache may take. free, weights: bytes a rank. longest: what a request of max_model_len needs."""
    args = choices.args
    if not _keeps_cache(facts):
        choices.unused("kv_cache_memory_bytes", "gpu_memory_utilization", why="an encoder keeps no cache")
        return 0
    if args.kv_cache_memory_bytes is not None:
        if args.gpu_memory_utilization is not None:
            raise ConfigError(
                "gpu_memory_utilization", args.gpu_memory_utilization, "kv_cache_memory_bytes is given too"
            )
        choices.note("kv_cache_memory_bytes", args.kv_cache_memory_bytes, "given")
        choices.note("gpu_memory_utilization", None, "not used: kv_cache_memory_bytes is given")
        return args.kv_cache_memory_bytes
    share = args.gpu_memory_utilization
    if share is not None:
        choices.note("gpu_memory_utilization", share, "given")
        return max(0, int(free * share) - weights)
    choices.note("gpu_memory_utilization", None, "not given: the KV cache takes what it is likely to use")
    # A quarter of what the weights leave stays free for activations and everything else.
    most = max(0, free - weights) * 3 // 4
    return min(max(min(free // 4, KV_BYTES // neighbours), longest), most)


def _weights_bytes(args: EngineArgs, facts: ModelFacts, dtype: Dtype) -> int:
    """The weights of all ranks once they are loaded."""
    item = 1 if args.quantization == "int8" else ITEM_BYTES[dtype]
    return facts.num_parameters * item or facts.weights_bytes


def _block_size(choices: Choices) -> int:
    reason = "small blocks waste little; the kernels read whole ones"
    return choices.pick("block_size", choices.args.block_size, BLOCK_SIZE, reason)


def _max_model_len(choices: Choices, facts: ModelFacts, max_tokens: int | None) -> int:
    """max_tokens: what the KV cache can hold; None without a cache."""
    asked, limit = choices.args.max_model_len, facts.max_positions
    if asked is not None and asked > limit:
        raise ConfigError("max_model_len", asked, f"the model has {limit} positions")
    if asked is not None and max_tokens is not None and asked > max_tokens:
        raise ConfigError("max_model_len", asked, f"the memory for the KV cache holds {max_tokens} tokens")
    if max_tokens is not None and max_tokens < limit:
        return choices.pick("max_model_len", asked, max_tokens, f"fits the KV cache (the model has {limit} positions)")
    return choices.pick("max_model_len", asked, limit, "the model's positions")


def _no_room(args: EngineArgs, budget: int, block: int, weights: int, free: int) -> ConfigError:
    """budget, block: bytes there are, and that one block takes. weights, free: bytes a rank."""
    needed = f"one block takes {_mib(block)}"
    if args.kv_cache_memory_bytes is not None:
        return ConfigError("kv_cache_memory_bytes", budget, f"leaves no room for KV cache: {needed}")
    left = f"the weights take {_mib(weights)} of a rank's {_mib(free)} of free memory"
    if args.gpu_memory_utilization is not None:
        accepted = (
            f"leaves no room for KV cache: {left}, {needed}; a larger share, or a higher tensor_parallel_size "
            "on more nodes, leaves some"
        )
        return ConfigError("gpu_memory_utilization", args.gpu_memory_utilization, accepted)
    accepted = (
        f"is too big: {left}, and {needed} of KV cache; free some, split the model over more nodes, "
        "or give kv_cache_memory_bytes to go beyond what is free"
    )
    return ConfigError("model", args.model, accepted)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"


def _scheduler(choices: Choices, facts: ModelFacts, max_model_len: int) -> SchedulerConfig:
    args, encoder = choices.args, not _keeps_cache(facts)
    if encoder and args.enable_chunked_prefill:
        raise ConfigError("enable_chunked_prefill", True, "an encoder needs whole prompts")
    chunked = choices.pick(
        "enable_chunked_prefill",
        args.enable_chunked_prefill,
        not encoder,
        "an encoder needs whole prompts" if encoder else "a long prompt must not stall the others",
    )
    max_num_seqs = _max_num_seqs(choices)
    least = max_num_seqs if chunked else max(max_num_seqs, max_model_len)
    tokens = choices.pick(
        "max_num_batched_tokens",
        args.max_num_batched_tokens,
        max(STEP_TOKENS, least),
        "the kernels reach their peak there"
        if least <= STEP_TOKENS
        else "the least that max_num_seqs or a prompt needs",
    )
    if tokens < max_num_seqs:
        raise ConfigError("max_num_batched_tokens", tokens, f"must be at least max_num_seqs={max_num_seqs}")
    if tokens < least:
        raise ConfigError(
            "max_num_batched_tokens", tokens, f"must be at least max_model_len={max_model_len}: prompts are not chunked"
        )
    overlap = "plans the next step while one runs; outputs are the same"
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=tokens,
        policy=choices.pick("scheduling_policy", args.scheduling_policy, "fcfs", "first come, first served is fair"),
        enable_chunked_prefill=chunked,
        optimize_for=choices.pick(
            "optimize_for", args.optimize_for, "throughput", "nobody watches the answers of a job come"
        ),
        depth=1 if choices.pick("async_scheduling", args.async_scheduling, True, overlap) else 0,
    )


def _max_num_seqs(choices: Choices) -> int:
    tokens = choices.args.max_num_batched_tokens
    if tokens is not None and tokens < MAX_NUM_SEQS:
        return choices.pick(
            "max_num_seqs", choices.args.max_num_seqs, tokens, "one token each of max_num_batched_tokens"
        )
    return choices.pick(
        "max_num_seqs", choices.args.max_num_seqs, MAX_NUM_SEQS, "the kernels are near their peak at that many rows"
    )


def _cache(
    choices: Choices,
    facts: ModelFacts,
    block_size: int,
    max_model_len: int,
    scheduler: SchedulerConfig,
    max_tokens: int | None,
) -> CacheConfig:
    args = choices.args
    if max_tokens is None:
        if args.enable_prefix_caching:
            raise ConfigError("enable_prefix_caching", True, "an encoder keeps no cache")
        choices.note("enable_prefix_caching", False, "an encoder keeps no cache")
        return CacheConfig(block_size=block_size, num_blocks=0, enable_prefix_caching=False)
    reason = "common prefixes are computed once"
    blocks_held = max_tokens // block_size
    if args.kv_cache_memory_bytes is None:
        blocks_held = min(blocks_held, scheduler.max_num_seqs * -(-max_model_len // block_size))
    return CacheConfig(
        block_size=block_size,
        num_blocks=blocks_held + 1,  # block 0 is the padding
        enable_prefix_caching=choices.pick("enable_prefix_caching", args.enable_prefix_caching, True, reason),
    )


def _model(choices: Choices, facts: ModelFacts, dtype: Dtype, max_model_len: int, path: str | None) -> ModelConfig:
    args = choices.args
    runner = "generate" if facts.kind == "decoder" else "pooling"
    if args.runner == "generate" and runner == "pooling":
        raise ConfigError("runner", args.runner, f"{facts.architecture} does not generate; pooling is accepted")
    choices.note("model", args.model, "given" if path in (None, args.model) else f"found at {path}")
    choices.note("quantization", args.quantization, "given" if args.quantization else "weights stay in dtype")
    choices.pick("tokenizer", args.tokenizer, args.model, "comes with the model")
    choices.note("revision", args.revision, "given" if args.revision else "the default branch")
    return ModelConfig(
        path=path or args.model,
        served_model_name=choices.pick("served_model_name", args.served_model_name, args.model, "as given in model"),
        dtype=dtype,
        max_model_len=max_model_len,
        quantization=args.quantization,
        load_format=choices.pick("load_format", args.load_format, "auto", "by the files' names"),
        runner=choices.pick("runner", args.runner, runner, f"{facts.kind}: {facts.architecture}"),
        trust_remote_code=choices.pick(
            "trust_remote_code", args.trust_remote_code, False, "code of a checkpoint runs only when asked for"
        ),
        seed=choices.pick("seed", args.seed, 0, "runs repeat exactly"),
    )
