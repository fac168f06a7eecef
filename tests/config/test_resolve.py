from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.config import EngineArgs, EngineConfig, MachineFacts, ModelFacts, resolve
from headway.config.machine import Launched
from headway.config.parallel import split_layers
from headway.config.resolve import kv_bytes_per_token
from headway.errors import ConfigError

DECODER = ModelFacts(
    architecture="LlamaForCausalLM",
    kind="decoder",
    max_positions=2048,
    dtype="bfloat16",
    vocab_size=49152,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    hidden_size=576,
    eos_token_ids=(2,),
    weights_bytes=100_000_000,
    num_parameters=135_000_000,
)
ENCODER = replace(
    DECODER, architecture="BertModel", kind="encoder", max_positions=512, dtype="float32", num_kv_heads=0, num_layers=6
)
CLASSIFIER = replace(ENCODER, architecture="BertForSequenceClassification", kind="classifier", num_labels=2)
MACHINE = MachineFacts(
    cores=4, free_memory=16 << 30, isas=("avx512", "avx2", "portable"), has_cpu_kernels=True, omp_num_threads=None
)


def settled(
    facts: ModelFacts = DECODER, machine: MachineFacts = MACHINE, path: str | None = None, **kwargs: Any
) -> EngineConfig:
    return resolve(EngineArgs.from_kwargs(model="m", **kwargs), facts, machine, path)


def why(config: EngineConfig, name: str) -> tuple[object, str]:
    choice = next(c for c in config.choices if c.name == name)
    return choice.value, choice.reason


def refused(facts: ModelFacts = DECODER, machine: MachineFacts = MACHINE, **kwargs: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        settled(facts, machine, **kwargs)
    return caught.value


@pytest.mark.parametrize("facts", [DECODER, ENCODER, CLASSIFIER])
def test_every_setting_has_a_value_and_a_reason(facts: ModelFacts) -> None:
    config = settled(facts)
    assert [c.name for c in config.choices] == list(EngineArgs.__dataclass_fields__)
    assert all(c.reason for c in config.choices)


def test_one_rank_runs_in_process_and_says_why() -> None:
    config = settled()
    assert config.parallel.executor == "uni"
    value, reason = why(config, "distributed_executor_backend")
    assert value == "uni"
    assert "tensor_parallel_size * pipeline_parallel_size = 1" in reason
    assert settled(distributed_executor_backend="auto") == config


def test_an_executor_that_is_not_there_names_those_that_are() -> None:
    accepted = refused(distributed_executor_backend="dask").accepted
    assert accepted == "must be auto, uni, mp, ray, external_launcher, or an import path module:Class"


def test_an_executor_of_the_users_own_is_an_import_path() -> None:
    assert settled(distributed_executor_backend="package.module:Mine").parallel.executor == "package.module:Mine"


def chosen(ray: Any = None, cores: int = 4, free_memory: int = 16 << 30, **kwargs: Any) -> tuple[object, str]:
    machine = replace(MACHINE, cores=cores, free_memory=free_memory, ray=ray)
    return why(settled(machine=machine, **kwargs), "distributed_executor_backend")


def test_several_ranks_run_in_processes_of_this_node() -> None:
    executor, reason = chosen(tensor_parallel_size=2, pipeline_parallel_size=2)
    assert executor == "mp" and "4 ranks" in reason and "fit on this node" in reason
    assert chosen("cluster", pipeline_parallel_size=2)[0] == "mp"


def test_the_last_pipeline_stage_has_fewer_layers_for_the_head_it_also_has() -> None:
    assert settled(pipeline_parallel_size=2).parallel.stage_layers == (15, 15)
    config = settled(replace(DECODER, head_layers=8.0), pipeline_parallel_size=2)
    assert config.parallel.stage_layers == (17, 13)
    assert kv_bytes_per_token(DECODER, "bfloat16", config.parallel) == 2 * 17 * 3 * 64 * 2
    assert "17, 13 layers" in why(config, "pipeline_parallel_size")[1]


@given(layers=st.integers(1, 100), stages=st.integers(1, 100), head=st.floats(0, 50))
def test_every_stage_has_layers(layers: int, stages: int, head: float) -> None:
    if stages <= layers:
        parts = split_layers(layers, stages, head)
        assert len(parts) == stages and sum(parts) == layers and min(parts) > 0


def test_ranks_that_do_not_fit_go_to_ray_where_there_is_a_cluster() -> None:
    executor, reason = chosen("cluster", cores=2, pipeline_parallel_size=3)
    assert executor == "ray" and "3 ranks for 2 cores" in reason
    executor, reason = chosen("cluster", free_memory=250 << 20, pipeline_parallel_size=2, max_model_len=64)
    assert executor == "ray" and "257 MiB of weights for 250 MiB of free memory" in reason
    executor, reason = chosen(cores=2, pipeline_parallel_size=3)
    assert executor == "mp" and "no Ray cluster is at hand" in reason
    assert chosen(cores=2, pipeline_parallel_size=3, ray_address="10.0.0.1:6379")[0] == "ray"


def test_inside_a_placement_group_several_ranks_take_its_bundles_and_one_stays_here() -> None:
    executor, reason = chosen("placement_group", tensor_parallel_size=2)
    assert executor == "ray" and reason == "2 ranks, and this process runs inside a Ray placement group"
    assert chosen("placement_group")[0] == "uni"


def test_uni_runs_one_rank_and_names_the_executors_that_run_more() -> None:
    error = refused(distributed_executor_backend="uni", tensor_parallel_size=3)
    assert error.field == "distributed_executor_backend"
    assert "tensor_parallel_size * pipeline_parallel_size = 3; auto, mp, ray and external_launcher" in error.accepted


def test_sizes_that_cannot_be_are_refused_by_name() -> None:
    assert refused(pipeline_parallel_size=31).accepted == "the model has 30 layers"
    assert refused(ENCODER, pipeline_parallel_size=2).field == "pipeline_parallel_size"
    assert refused(tensor_parallel_size=10).accepted == "the model has 9 heads"


def test_ranks_of_a_node_divide_its_cores_and_its_memory() -> None:
    small = replace(MACHINE, free_memory=4 << 30)
    one, two = settled(machine=small), settled(machine=small, pipeline_parallel_size=2)
    assert (one.device.threads, two.device.threads) == (4, 2)
    assert "a rank's share of the 4 cores that 2 ranks may use" in why(two, "threads")[1]
    assert settled(machine=replace(small, cores=2), pipeline_parallel_size=3).device.threads == 1
    assert abs(one.cache.num_blocks - two.cache.num_blocks) <= 1  # half the layers in half the memory
    assert "which 2 ranks divide" in why(two, "kv_cache_memory_bytes")[1]


def test_replicas_are_ranks_of_this_node_too() -> None:
    one, two = settled(), settled(data_parallel_size=2)
    assert (two.parallel.data_parallel_size, two.parallel.data_parallel_backend) == (2, "mp")
    assert (one.device.threads, two.device.threads, settled(data_parallel_size=2, threads=4).device.threads) == (
        4,
        2,
        4,
    )
    assert "a rank's share of the 4 cores that 2 ranks may use" in why(two, "threads")[1]
    assert settled(data_parallel_size=2, tensor_parallel_size=2).device.threads == 1
    assert settled(data_parallel_size=2).parallel.executor == "uni"  # each of them


def test_replicas_that_cannot_be_are_refused_by_name() -> None:
    assert refused(data_parallel_size=2, data_parallel_size_local=1).accepted == (
        "must be data_parallel_size=2 where data_parallel_backend is mp"
    )
    ray = {"data_parallel_size": 2, "data_parallel_backend": "ray"}
    assert refused(**ray, data_parallel_size_local=3).field == "data_parallel_size_local"
    external = {"distributed_executor_backend": "external_launcher", "tensor_parallel_size": 2}
    assert refused(machine=launched(4), **external, data_parallel_size=2).field == "data_parallel_size"
    with pytest.warns(RuntimeWarning, match="data_parallel_backend='mp' is not used: one replica"):
        settled(data_parallel_backend="mp")


def test_replicas_on_ray_go_where_there_is_room_unless_some_are_for_the_head_node() -> None:
    ray = {"data_parallel_size": 4, "data_parallel_backend": "ray"}
    anywhere, divided = settled(**ray), settled(**ray, data_parallel_size_local=2, data_parallel_address="head")
    assert anywhere.parallel.executor == "uni" and anywhere.ray.strategy == "STRICT_PACK"
    assert anywhere.parallel.data_parallel_size_local is None
    assert (divided.parallel.data_parallel_size_local, divided.parallel.data_parallel_address) == (2, "head")
    assert (anywhere.device.threads, divided.device.threads) == (1, 2)  # as many as a node may have to hold
    assert anywhere.ray.bundles == ({"CPU": 1.0},) and divided.ray.bundles == ({"CPU": 2.0},)
    wide = settled(**ray, placement_group_config={"bundle_per_worker": {"CPU": 1}, "strategy": "SPREAD"})
    assert wide.ray.strategy == "SPREAD"
    with pytest.warns(RuntimeWarning, match="data_parallel_rpc_port=1300 is not used: every engine takes a free port"):
        settled(**ray, data_parallel_rpc_port=1300)
    with pytest.warns(RuntimeWarning, match="data_parallel_address='head' is not used: no replica has to be on"):
        settled(**ray, data_parallel_address="head")


def launched(world_size: int, **kwargs: Any) -> MachineFacts:
    own = Launched(rank=0, world_size=world_size, local_rank=0, local_world_size=world_size)
    return replace(MACHINE, launched=own, **kwargs)


def test_an_external_launcher_must_have_launched_this_process() -> None:
    error = refused(distributed_executor_backend="external_launcher")
    assert "WORLD_SIZE" in error.accepted and "torchrun" in error.accepted


def test_a_launch_holds_whole_replicas() -> None:
    external = {"distributed_executor_backend": "external_launcher"}
    assert settled(machine=launched(2), **external, pipeline_parallel_size=2).parallel.executor == "external_launcher"
    assert settled(machine=launched(4), **external, pipeline_parallel_size=2).device.threads == 1
    error = refused(machine=launched(3), **external, pipeline_parallel_size=2)
    assert "tensor_parallel_size * pipeline_parallel_size = 2 must divide WORLD_SIZE = 3" in error.accepted


def test_torchruns_own_omp_num_threads_is_no_choice() -> None:
    external = {"distributed_executor_backend": "external_launcher", "pipeline_parallel_size": 2}
    assert settled(machine=launched(2, omp_num_threads=1), **external).device.threads == 2
    assert settled(machine=launched(2, omp_num_threads=3), **external).device.threads == 3


def test_processes_of_a_launch_leave_each_other_room_whatever_they_start() -> None:
    assert settled(machine=launched(4, omp_num_threads=1)).device.threads == 1
    assert settled(machine=launched(1), pipeline_parallel_size=2).device.threads == 2


def test_given_settings_win_and_are_marked_as_given() -> None:
    config = settled(max_num_seqs=7, dtype="float32", threads=1, async_scheduling=False, served_model_name="x")
    assert (config.scheduler.max_num_seqs, config.model.dtype, config.device.threads) == (7, "float32", 1)
    assert config.scheduler.depth == 0
    assert config.model.served_model_name == "x"
    assert why(config, "max_num_seqs") == (7, "given")


def test_the_path_of_a_named_model_is_reported() -> None:
    config = settled(path="/models/m.gguf")
    assert (config.model.path, config.model.served_model_name) == ("/models/m.gguf", "m")
    assert "/models/m.gguf" in why(config, "model")[1]


def test_decoders_compute_in_bfloat16_and_float32_encoders_stay_exact() -> None:
    assert settled().model.dtype == "bfloat16"
    assert settled(replace(DECODER, dtype="float32")).model.dtype == "bfloat16"
    assert settled(ENCODER).model.dtype == "float32"
    assert settled(replace(ENCODER, dtype="float16")).model.dtype == "bfloat16"


def test_encoders_keep_no_cache_and_take_whole_prompts() -> None:
    config = settled(CLASSIFIER)
    assert config.cache.num_blocks == 0
    assert not config.cache.enable_prefix_caching
    assert not config.scheduler.enable_chunked_prefill
    assert config.model.runner == "pooling"
    assert refused(ENCODER, enable_chunked_prefill=True).field == "enable_chunked_prefill"
    assert refused(ENCODER, enable_prefix_caching=True).field == "enable_prefix_caching"
    assert refused(ENCODER, runner="generate").field == "runner"


def test_the_kv_cache_holds_every_running_request_when_memory_allows() -> None:
    config = settled(max_num_seqs=8)
    assert config.cache.num_blocks == 8 * 2048 // 16 + 1


def kv_bytes(config: EngineConfig) -> int:
    return (config.cache.num_blocks - 1) * 16 * kv_bytes_per_token(DECODER, "bfloat16", config.parallel)


@pytest.mark.parametrize(("free", "most"), [(2 << 30, 1 << 29), (64 << 30, 4 << 30)])
def test_the_kv_cache_takes_a_quarter_of_the_free_memory_and_at_most_4_gib(free: int, most: int) -> None:
    config = settled(machine=replace(MACHINE, free_memory=free))
    assert kv_bytes(config) <= most < kv_bytes(config) + (1 << 20)
    value, reason = why(config, "kv_cache_memory_bytes")
    assert value == kv_bytes(config) and "a quarter of the free memory and 4 GiB" in reason


def test_the_kv_cache_holds_one_longest_request_where_memory_allows() -> None:
    long = replace(DECODER, max_positions=1 << 19)  # 11.25 GiB of keys and values
    config = settled(long, replace(MACHINE, free_memory=20 << 30))
    assert config.model.max_model_len == 1 << 19
    assert kv_bytes(config) == (1 << 19) * 23040
    less = settled(long, replace(MACHINE, free_memory=15 << 30))
    assert less.model.max_model_len < 1 << 19
    assert kv_bytes(less) == less.model.max_model_len * 23040


def test_a_given_share_of_memory_is_used_beside_the_weights() -> None:
    config = settled(machine=replace(MACHINE, free_memory=2 << 30), gpu_memory_utilization=0.5)
    assert kv_bytes(config) <= (1 << 30) - 2 * DECODER.num_parameters < kv_bytes(config) + (1 << 20)


def test_given_kv_memory_is_used_whole() -> None:
    config = settled(kv_cache_memory_bytes=100_000_000, max_num_seqs=1)
    assert config.cache.num_blocks == 100_000_000 // (23040 * 16) + 1


def test_max_model_len_is_what_the_model_has_or_what_fits() -> None:
    assert settled().model.max_model_len == 2048
    config = settled(kv_cache_memory_bytes=1024 * 23040)
    assert config.model.max_model_len == 1024
    assert "fits" in why(config, "max_model_len")[1]


def test_a_max_model_len_that_cannot_be_is_refused() -> None:
    assert refused(max_model_len=4096).accepted == "the model has 2048 positions"
    assert "holds 1024 tokens" in refused(max_model_len=2048, kv_cache_memory_bytes=1024 * 23040).accepted


def test_no_room_for_a_block_names_the_memory_setting_or_the_model() -> None:
    given = refused(kv_cache_memory_bytes=1000)
    assert (given.field, given.accepted) == (
        "kv_cache_memory_bytes",
        "leaves no room for KV cache: one block takes 0.4 MiB",
    )
    automatic = refused(machine=replace(MACHINE, free_memory=1 << 20))
    assert automatic.field == "model"
    assert automatic.accepted.startswith(
        "is too big: the weights take 257.5 MiB of a rank's 1.0 MiB of free memory, and one block takes 0.4 MiB"
    )
    assert refused(gpu_memory_utilization=0.01).field == "gpu_memory_utilization"


def test_a_setting_that_nothing_reads_warns_whoever_gave_it() -> None:
    unread: list[tuple[ModelFacts, dict[str, Any], str]] = [
        (DECODER, {"ray_address": "x"}, "ray_address='x' is not used: the executor is uni"),
        (DECODER, {"placement_group_config": {"odd": 1}}, "placement_group_config=.* is not used"),
        (DECODER, {"step_timeout_s": 5.0}, "step_timeout_s=5.0 is not used: the executor is uni"),
        (ENCODER, {"kv_cache_memory_bytes": 1 << 30}, "is not used: an encoder keeps no cache"),
    ]
    for facts, settings, said in unread:
        with pytest.warns(RuntimeWarning, match=said) as caught:
            config = settled(facts, **settings)
        assert len(caught) == 1 and caught[0].filename == __file__
        assert why(config, next(iter(settings)))[1].startswith("not used: ")


def test_timeouts_say_whether_they_were_given() -> None:
    two = {"distributed_executor_backend": "mp", "tensor_parallel_size": 2}
    assert why(settled(**two, step_timeout_s=5.0), "step_timeout_s") == (5.0, "given")
    assert "hangs" in why(settled(**two), "start_timeout_s")[1]
    assert why(settled(), "start_timeout_s") == (600.0, "not used: the executor is uni")


def test_two_ways_to_size_the_cache_contradict() -> None:
    assert refused(kv_cache_memory_bytes=1 << 30, gpu_memory_utilization=0.5).field == "gpu_memory_utilization"


def test_a_step_must_hold_a_token_of_every_request() -> None:
    assert "max_num_seqs=64" in refused(max_num_batched_tokens=32, max_num_seqs=64).accepted
    assert settled(max_num_batched_tokens=32).scheduler.max_num_seqs == 32
    assert settled(max_num_seqs=2000).scheduler.max_num_batched_tokens == 2000


def test_without_chunking_a_step_must_hold_the_longest_prompt() -> None:
    assert settled(enable_chunked_prefill=False).scheduler.max_num_batched_tokens == 2048
    assert "max_model_len=2048" in refused(enable_chunked_prefill=False, max_num_batched_tokens=1024).accepted
    long = replace(ENCODER, max_positions=8192)
    assert settled(long).scheduler.max_num_batched_tokens == 8192
    assert "max_model_len=8192" in refused(long, max_num_batched_tokens=4096).accepted


def test_without_compiled_kernels_the_reference_runs_and_a_warning_says_so() -> None:
    bare = replace(MACHINE, has_cpu_kernels=False)
    with pytest.warns(RuntimeWarning, match="the compiled kernels are not installed") as caught:
        config = settled(machine=bare)
    assert caught[0].filename == __file__  # the caller's line, not one of ours
    assert config.device.ops == "reference"
    assert why(config, "ops")[1] == "the compiled kernels are not installed"
    assert refused(machine=bare, ops="cpu").field == "ops"
    assert refused(machine=bare, ops="reference", quantization="int8").field == "quantization"


def test_kernels_and_types_that_contradict_are_refused() -> None:
    assert refused(ops="reference", quantization="int8").field == "quantization"
    assert refused(ops="reference", isa="avx2").field == "isa"
    assert refused(isa="avx512bf16").accepted == "this CPU has: avx512, avx2, portable"
    assert refused(dtype="float16").accepted == "the cpu kernels compute in bfloat16 or float32"


def test_threads_follow_the_environment_then_the_cores() -> None:
    assert settled().device.threads == 4
    config = settled(machine=replace(MACHINE, omp_num_threads=2))
    assert why(config, "threads") == (2, "OMP_NUM_THREADS is set")


@given(
    memory=st.integers(1 << 20, 1 << 36),
    max_num_seqs=st.none() | st.integers(1, 5000),
    tokens=st.none() | st.integers(1, 10_000),
    length=st.none() | st.integers(1, 4096),
    chunked=st.none() | st.booleans(),
)
def test_what_is_resolved_is_consistent_or_refused(
    memory: int, max_num_seqs: int | None, tokens: int | None, length: int | None, chunked: bool | None
) -> None:
    given_settings: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": tokens,
        "max_model_len": length,
        "enable_chunked_prefill": chunked,
    }
    try:
        config = settled(machine=replace(MACHINE, free_memory=memory), **given_settings)
    except ConfigError:
        return
    assert config.scheduler.max_num_batched_tokens >= config.scheduler.max_num_seqs
    assert (config.cache.num_blocks - 1) * config.cache.block_size >= config.model.max_model_len
    assert config.scheduler.enable_chunked_prefill or (
        config.scheduler.max_num_batched_tokens >= config.model.max_model_len
    )
