"""One rank of an engine: loads its share of the model and executes step plans."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from headway.errors import ConfigError
from headway.messages import PoolingParams, SamplingParams, SlotStart, StepPlan, StepResult, WorkerInfo
from headway.models.decoder import Decoder
from headway.models.encoder import Encoder
from headway.models.registry import load_model
from headway.models.spec import Shard
from headway.ops import get_ops
from headway.worker.batch import Batch
from headway.worker.group import open_comm
from headway.worker.memory import WorkerMemory
from headway.worker.runner import DecoderRunner, EncoderRunner, Masks, Runner

if TYPE_CHECKING:
    from headway.config.settings import EngineConfig
    from headway.messages import RankGroup
    from headway.models.port import CausalModel, EncoderModel
    from headway.models.update import Weights
    from headway.ops.cpu.comm import SharedComm
    from headway.ops.port import KVCache, Ops
    from headway.worker.group import GlooComm
    from headway.worker.link import Links
    from headway.worker.program import Program

_MOST_RECORDED = 100_000


class Worker:
    """Used by one thread: ``load`` once, then ``step`` in the order of the plans. An exception in a step ends it."""

    def __init__(self, config: EngineConfig, rank: int = 0, group: RankGroup | None = None) -> None:
        """group: how it reaches the other ranks, where there are any."""
        self._config, self._rank, self._group = config, rank, group
        self._runner: Runner | None = None
        self._comm: SharedComm | GlooComm | None = None
        self._links: Links | None = None
        self._memory: WorkerMemory | None = None
        parallel = config.parallel
        asked = config.trace is not None and parallel.executor != "external_launcher"  # whose engines see one rank each
        self._records = asked and rank != parallel.reporting_rank
        self._recorded: deque[tuple[int, dict[str, int]]] = deque(maxlen=_MOST_RECORDED)

    def load(self) -> WorkerInfo:
        """Loads and packs the weights, reserves the KV cache, runs one token. Raises what load_model raises."""
        config = self._config
        torch.set_num_threads(config.device.threads)
        began = time.perf_counter()
        ops = get_ops(config.device.ops, threads=config.device.threads, isa=config.device.isa)
        self._comm = open_comm(config, self._rank, self._group)
        model = load_model(config.model, ops, self._shard(), self._comm)
        loaded = time.perf_counter()
        kv: KVCache | None = None
        program: Program | None = None
        vocab_size = 0
        if isinstance(model, Encoder):
            self._runner = EncoderRunner(model, self._batch(vocab_size=0))
        else:
            model = cast("CausalModel", model)
            kv = self._allocate_kv(model)
            program = self._compile(model, ops, kv)
            vocab_size = model.vocab_size
            self._runner = self._decoder_runner(model, kv, program)
        self._memory = WorkerMemory(model, kv, config.model)
        prepared = time.perf_counter()
        self._warm_up()
        self._recorded.clear()
        phases = {"load": loaded - began, "prepare": prepared - loaded, "warm-up": time.perf_counter() - prepared}
        return self._info(model, vocab_size, ops, kv, program, phases)

    def step(self, plan: StepPlan, masks: Masks) -> StepResult:
        """Executes one plan; masks(step) is called after the forward pass where the plan has masked slots.

        times_ns: "prepare" (the batch and inputs), "model" (forward pass, logits), "sample" (tokens, pooling, reports);
        "wait" (for other pipeline stages); "start" and "end" of the step on this machine's monotonic clock.
        """
        assert self._runner is not None, "load() comes first"
        start = time.perf_counter_ns()
        with torch.inference_mode():
            result = self._runner.step(plan, masks)
        result.times_ns |= {"start": start, "end": time.perf_counter_ns()}
        if self._records:
            self._recorded.append((plan.step, result.times_ns))
        return result

    def recorded_steps(self) -> list[tuple[int, dict[str, int]]]:
        """Step and times_ns of the last steps, of a rank whose results the engine that writes a trace does not see."""
        return list(self._recorded)

    def check_weights(self, path: str | None) -> None:
        """Whether an update from there, or None from tensors, can begin. See models.update."""
        assert self._memory is not None, "load() comes first"
        self._memory.check_weights(path)

    def update_weights(self, weights: Weights) -> None:
        """Between steps: other weights in the place of these, from here on. See models.update."""
        assert self._memory is not None, "load() comes first"
        self._memory.update_weights(weights)

    def sleep(self, level: int) -> None:
        """Between steps: gives back the memory of the cache, at level 2 of the weights too."""
        assert self._memory is not None, "load() comes first"
        self._memory.sleep(level)

    def reload_weights(self) -> None:
        """Those that the model was loaded with."""
        assert self._memory is not None, "load() comes first"
        self._memory.update_weights(None)

    def close(self) -> None:
        """Lets go of the model, the cache and the other ranks."""
        self._runner = self._memory = None
        if self._comm is not None:
            self._comm.close()
            self._comm = None
        if self._links is not None:
            self._links.close()
            self._links = None

    def _shard(self) -> Shard:
        parallel = self._config.parallel
        pipeline_rank, tensor_rank = divmod(self._rank, parallel.tensor_parallel_size)
        return Shard(
            tensor_rank=tensor_rank,
            tensor_size=parallel.tensor_parallel_size,
            pipeline_rank=pipeline_rank,
            pipeline_size=parallel.pipeline_parallel_size,
            stage_layers=parallel.stage_layers,
        )

    def _allocate_kv(self, model: CausalModel) -> KVCache:
        cache = self._config.cache
        try:
            return model.allocate_kv(cache.num_blocks, cache.block_size)
        except (OSError, OverflowError, RuntimeError) as error:
            accepted = f"rank {self._rank} cannot have so much memory ({error})"
            raise ConfigError("kv_cache_memory_bytes", f"{cache.num_blocks} blocks", accepted) from error

    def _batch(self, vocab_size: int) -> Batch:
        config = self._config
        stages = config.parallel.pipeline_parallel_size
        return Batch(
            config.scheduler.max_num_seqs, config.model.max_model_len, config.cache.block_size, vocab_size, stages
        )

    def _decoder_runner(self, model: CausalModel, kv: KVCache, program: Program | None) -> Runner:
        batch, most = self._batch(model.vocab_size), self._config.scheduler.max_num_batched_tokens
        stages = self._config.parallel.pipeline_parallel_size
        if stages == 1:
            return DecoderRunner(model, kv, batch, most, program)
        from headway.worker.link import open_links
        from headway.worker.stage import StageRunner

        assert isinstance(model, Decoder) and self._group is not None
        self._links = open_links(self._config, self._rank, self._group, model.spec.hidden_size)
        if model.shard.last:
            return DecoderRunner(model, kv, batch, most, program, self._links)
        return StageRunner(model, kv, batch, self._links, most, stages, program)

    def _compile(self, model: CausalModel, ops: Ops, kv: KVCache) -> Program | None:
        """The model's step as one native call, where the kernels and the architecture have one."""
        config = self._config
        if config.device.enforce_eager or config.model.runner != "generate":  # what pools needs hidden states
            return None
        builder = ops.program_builder(kv, self._comm)
        if builder is None or not isinstance(model, Decoder):
            return None
        from headway.models.compile import compile_decoder

        scheduler = config.scheduler
        return compile_decoder(
            model, builder, max_tokens=scheduler.max_num_batched_tokens, max_runs=scheduler.max_num_seqs
        )

    def _warm_up(self) -> None:
        """One token through everything, its keys and values in the padding block."""
        generates = self._config.model.runner == "generate"
        start = SlotStart(
            slot=0,
            token_ids=np.zeros(1, np.int32).tobytes(),
            prompt_len=1,
            num_computed=0,
            block_ids=[0],
            sampling=SamplingParams(temperature=0) if generates else None,
            pooling=None if generates else PoolingParams(),
        )
        self.step(StepPlan(step=0, starts=[start], runs=np.array([0, 1], np.int32).tobytes()), lambda step: {})
        self.step(StepPlan(step=0, releases=[0], runs=b""), lambda step: {})

    def _info(
        self,
        model: CausalModel | EncoderModel,
        vocab_size: int,
        ops: Ops,
        kv: KVCache | None,
        program: Program | None,
        startup_s: dict[str, float],
    ) -> WorkerInfo:
        config = self._config
        return WorkerInfo(
            executor=config.parallel.executor,
            num_blocks=config.cache.num_blocks,
            block_size=config.cache.block_size,
            vocab_size=vocab_size,
            threads=config.device.threads,
            kernels=ops.description,
            program=program is not None,
            weights_bytes=model.weights_bytes,
            kv_bytes=kv.nbytes if kv is not None else 0,
            startup_s=startup_s,
            pids=[os.getpid()],
        )
