"""How many ranks, and where they run."""

from __future__ import annotations

from typing import Literal

from headway.config.choices import Choices
from headway.config.facts import ModelFacts
from headway.config.machine import MachineFacts
from headway.config.settings import ParallelConfig
from headway.errors import ConfigError

EXECUTORS = ("uni", "mp", "ray", "external_launcher", "fake")
ACCEPTED = f"auto, {', '.join(e for e in EXECUTORS if e != 'fake')}, or an import path module:Class"
TIMEOUTS = ("start_timeout_s", "step_timeout_s")
PRODUCT = "tensor_parallel_size * pipeline_parallel_size"


def resolve_parallel(choices: Choices, facts: ModelFacts, machine: MachineFacts, weights: int) -> ParallelConfig:
    """weights: bytes of the whole model once it is loaded. Raises ConfigError."""
    args = choices.args
    tp, pp, dp = args.tensor_parallel_size, args.pipeline_parallel_size, args.data_parallel_size
    if tp > facts.num_heads:
        raise ConfigError("tensor_parallel_size", tp, f"the model has {facts.num_heads} heads")
    if pp > 1 and not facts.num_kv_heads:
        raise ConfigError("pipeline_parallel_size", pp, "must be 1 for an encoder; tensor_parallel_size divides it")
    if pp > facts.num_layers:
        raise ConfigError("pipeline_parallel_size", pp, f"the model has {facts.num_layers} layers")
    choices.note("tensor_parallel_size", tp, "given" if tp > 1 else "not split")
    stage_layers = split_layers(facts.num_layers, pp, facts.head_layers)
    stages = f"given; stages of {', '.join(map(str, stage_layers))} layers, the last with the head"
    choices.note("pipeline_parallel_size", pp, stages if pp > 1 else "not split")
    choices.note("data_parallel_size", dp, "given; each replica in a process of its own" if dp > 1 else "one replica")
    executor = _executor(choices, machine, tp * pp, weights)
    backend = _replicas(choices, executor)
    _head_node(choices, backend)
    if executor in ("uni", "fake"):
        choices.unused(*TIMEOUTS, why=f"the executor is {executor}")
    else:
        for name in TIMEOUTS:
            choices.default(name, "a worker that hangs must not hang its callers")
    return ParallelConfig(
        executor=executor,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        data_parallel_size=dp,
        data_parallel_backend=backend,
        data_parallel_size_local=args.data_parallel_size_local if backend == "ray" else None,
        data_parallel_address=args.data_parallel_address,
        stage_layers=stage_layers,
        start_timeout_s=args.start_timeout_s,
        step_timeout_s=args.step_timeout_s,
    )


def _replicas(choices: Choices, executor: str) -> Literal["mp", "ray"]:
    """Where they run."""
    dp, asked = choices.args.data_parallel_size, choices.args.data_parallel_backend
    if dp == 1:
        choices.unused("data_parallel_backend", why="one replica")
        return "mp"
    if executor == "external_launcher":
        accepted = "must be 1: the launcher's processes make replicas by themselves, as many as WORLD_SIZE has room for"
        raise ConfigError("data_parallel_size", dp, accepted)
    return choices.pick("data_parallel_backend", asked, "mp", "processes of this node")


def _head_node(choices: Choices, backend: str) -> None:
    """How many replicas are there, and which node that is."""
    dp, local = choices.args.data_parallel_size, choices.args.data_parallel_size_local
    choices.unused("data_parallel_rpc_port", why="every engine takes a free port, and tells which")
    if local is not None and (local > dp or (backend == "mp" and local != dp)):
        at_most = "at most " if backend == "ray" else ""
        accepted = f"must be {at_most}data_parallel_size={dp} where data_parallel_backend is {backend}"
        raise ConfigError("data_parallel_size_local", local, accepted)
    choices.pick("data_parallel_size_local", local, None, "all on this node" if backend == "mp" else "any with room")
    if backend == "mp" or local is None:
        choices.unused("data_parallel_address", why="no replica has to be on, or off, one node")
    else:
        choices.pick("data_parallel_address", choices.args.data_parallel_address, None, "this node")


def split_layers(num_layers: int, stages: int, head_layers: float) -> tuple[int, ...]:
    """Layers of each stage. The last one also has the head, worth so many layers to a step of decodes.

    Prompts hardly use it. Half its weight loses least whatever the mixture: SmolLM2 in two stages has 17 and 13 layers,
    where 19 and 11 would be even for decodes, 15 and 15 for prompts.
    """
    if stages == 1:
        return (num_layers,)
    last = max(1, int((num_layers + head_layers / 2) / stages - head_layers / 2))
    base, extra = divmod(num_layers - last, stages - 1)
    return (*(base + (stage < extra) for stage in range(stages - 1)), last)


def ranks_on_this_node(parallel: ParallelConfig, machine: MachineFacts, weights: int) -> int:
    """Ranks that share this node's cores and memory. weights: bytes of the whole model."""
    processes = 1 if machine.launched is None else machine.launched.local_world_size
    if parallel.executor == "external_launcher":
        return processes
    dp, local = parallel.data_parallel_size, parallel.data_parallel_size_local
    ranks = parallel.ranks * (dp if local is None else max(local, dp - local))
    if "ray" in (parallel.executor, parallel.data_parallel_backend):  # other nodes are taken to be like this one
        fitting = machine.free_memory * parallel.ranks // max(weights, 1)
        return max(1, min(ranks, machine.cores, fitting))
    return ranks * processes  # each of which may start an engine


def _executor(choices: Choices, machine: MachineFacts, ranks: int, weights: int) -> str:
    asked = choices.args.distributed_executor_backend
    cluster = machine.ray is not None or choices.args.ray_address is not None
    automatic, reason = _automatic(machine, ranks, weights, cluster)  # of each replica
    executor = choices.pick("distributed_executor_backend", None if asked == "auto" else asked, automatic, reason)
    if executor not in EXECUTORS and ":" not in executor:
        raise ConfigError("distributed_executor_backend", asked, f"must be {ACCEPTED}")
    if executor == "uni" and ranks > 1:
        accepted = f"runs one rank, but {PRODUCT} = {ranks}; auto, mp, ray and external_launcher run several"
        raise ConfigError("distributed_executor_backend", asked, accepted)
    if executor == "external_launcher":
        _check_launch(machine, ranks)
    return executor


def _automatic(machine: MachineFacts, ranks: int, weights: int, cluster: bool) -> tuple[str, str]:
    """The executor, and why. cluster: one of Ray is at hand."""
    if ranks == 1:
        return "uni", f"one rank ({PRODUCT} = 1) needs no other process"
    if machine.ray == "placement_group":
        return "ray", f"{ranks} ranks, and this process runs inside a Ray placement group"
    if ranks <= machine.cores and weights <= machine.free_memory:
        return "mp", f"{ranks} ranks ({PRODUCT}) fit on this node, a process each"
    lacking = (
        f"{ranks} ranks for {machine.cores} cores"
        if ranks > machine.cores
        else f"{weights >> 20} MiB of weights for {machine.free_memory >> 20} MiB of free memory"
    )
    if cluster:
        return "ray", f"this node is too small ({lacking}), and a Ray cluster is at hand"
    return "mp", f"no Ray cluster is at hand, so all ranks share this node, small as it is ({lacking})"


def _check_launch(machine: MachineFacts, ranks: int) -> None:
    launched = machine.launched
    if launched is None:
        accepted = "needs RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the environment: run the script "
        raise ConfigError("distributed_executor_backend", "external_launcher", accepted + "with torchrun")
    if launched.world_size % ranks:
        accepted = f"{PRODUCT} = {ranks} must divide WORLD_SIZE = {launched.world_size}: so many ranks make a replica"
        raise ConfigError("distributed_executor_backend", "external_launcher", accepted)
