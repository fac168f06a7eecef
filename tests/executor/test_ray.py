"""The ray executor on two nodes of one machine: the engine's has the resource ``here``, the other one ``there``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from headway import LLM, RequestOutput, SamplingParams
from headway.config import DeviceConfig, EngineConfig, ModelConfig, ParallelConfig, RayConfig
from headway.errors import ConfigError, EngineError, ModelError, WorkerDied, WorkerError
from headway.executor.launcher import Ticket
from headway.executor.ray import RayExecutor
from headway.executor.ray.actor import RankActor
from headway.executor.ray.cluster import connection
from headway.executor.ray.placement import Group, Seat, in_rank_order
from headway.messages import StepPlan

HERE, THERE = {"CPU": 1.0, "here": 1.0}, {"CPU": 1.0, "there": 1.0}
MARK = "OF_THE_TESTS_PROCESS", str(os.getpid())
STOP, SLEEP = 3, 4  # what a plan tells a small worker
PROMPTS = ["The capital of France is", "One, two, three,"]
Make = Callable[..., RayExecutor]


@pytest.fixture(scope="module")
def cluster() -> Generator[str]:
    """Two CPUs here and one there. Its address."""
    node = {"object_store_memory": 80 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the small worker
        patch.setenv(*MARK)
        head = {"num_cpus": 2, "resources": {"here": 2}, "include_dashboard": False, **node}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1, resources={"there": 1}, **node)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: str) -> Generator[None]:
    before = ray.cluster_resources()
    yield
    wait_until(lambda: (ray.available_resources(), rank_processes(), groups()), (before, [], []))


def wait_until(state: Callable[[], Any], wanted: object) -> None:
    """Ray ends processes of other nodes, and frees what they held, in its own time."""
    deadline = time.monotonic() + 20
    while (now := state()) != wanted:
        assert time.monotonic() < deadline, now
        time.sleep(0.01)


def groups() -> list[str]:
    return [name for name, group in placement_group_table().items() if group["state"] != "REMOVED"]


def rank_processes() -> list[int]:
    """Of this cluster."""

    def is_one(process: Path) -> bool:
        try:
            is_rank = (process / "cmdline").read_bytes().startswith(b"ray::RankActor")
            return is_rank and "=".join(MARK).encode() in (process / "environ").read_bytes().split(b"\0")
        except OSError:
            return False

    return [int(process.name) for process in Path("/proc").glob("[0-9]*") if is_one(process)]


@pytest.fixture
def make() -> Generator[Make]:
    made: list[RayExecutor] = []

    def make(*bundles: dict[str, float], **settings: Any) -> RayExecutor:
        made.append(executor(*bundles, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def executor(*bundles: dict[str, float], model: str = "", timeout_s: float = 30.0) -> RayExecutor:
    """With one rank a bundle, and workers that load nothing."""
    config = EngineConfig(
        model=ModelConfig(path=model, served_model_name=""),
        parallel=ParallelConfig(executor="ray", tensor_parallel_size=len(bundles)),
        ray=RayConfig(bundles=bundles, timeout_s=timeout_s),
    )
    return RayExecutor(config, "small_worker:SmallWorker")


def tokens(backend: str, **settings: Any) -> list[list[int]]:
    with LLM("smollm2-135m-instruct", distributed_executor_backend=backend, max_model_len=256, **settings) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=16, temperature=0))
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_tokens_are_those_of_uni_on_either_node() -> None:
    expected = tokens("uni", threads=1)
    for bundle in (HERE, THERE):
        assert tokens("ray", threads=1, placement_group_config={"bundles": [bundle]}) == expected


@pytest.mark.parametrize(
    "ranks", [{"tensor_parallel_size": 2}, pytest.param({"pipeline_parallel_size": 2}, marks=pytest.mark.long)]
)
def test_ranks_on_two_nodes_give_the_tokens_of_ranks_on_one(ranks: dict[str, int]) -> None:
    placement = {"bundles": [HERE, THERE]}
    expected = tokens("mp", threads=1, **ranks)
    assert tokens("ray", threads=1, placement_group_config=placement, **ranks) == expected


@pytest.mark.parametrize(
    ("number", "step_timeout_s", "error", "message"),
    [
        (signal.SIGKILL, 60.0, WorkerDied, "rank 1 ended"),
        (signal.SIGSTOP, 1.0, EngineError, r"within 1(\.0)? s \(step_timeout_s\)"),
    ],
)
def test_callers_learn_what_became_of_a_rank_while_requests_run(
    number: signal.Signals, step_timeout_s: float, error: type[EngineError], message: str
) -> None:
    settings = {"max_model_len": 512, "max_num_seqs": 4, "threads": 1, "step_timeout_s": step_timeout_s}
    placement = {"bundles": [HERE, HERE]}
    began = 0.0
    with LLM(
        "smollm2-135m-instruct",
        distributed_executor_backend="ray",
        tensor_parallel_size=2,
        placement_group_config=placement,
        **settings,
    ) as llm:

        def strike(output: RequestOutput) -> None:
            nonlocal began
            os.kill(llm.executor_info.pids[1], number)
            began = time.monotonic()
            time.sleep(0.3)  # the other rank has told what it knows by the time that anybody looks

        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (4, 400)]
        with pytest.raises(error, match=message):
            llm.generate(PROMPTS, params, on_output=strike)
        assert time.monotonic() - began < 3
    assert time.monotonic() - began < 8


def test_an_address_of_another_cluster_than_the_connected_one_is_refused(cluster: str) -> None:
    host, _, port = cluster.rpartition(":")
    assert not connection.open(cluster, 1) and not connection.open(f"localhost:{port}", 1)
    with pytest.raises(ConfigError, match=f"ray_address='{host}:1': this process is connected to Ray at {cluster}"):
        connection.open(f"{host}:1", 1)


def test_engines_of_one_program_have_a_group_each_and_give_it_back(make: Make) -> None:
    first, second = make(HERE), make(HERE, THERE)
    first.start()
    assert second.start().num_blocks == 9, "the fewest of both ranks"
    assert len(groups()) == 2 and len(rank_processes()) == 3
    assert second.call("echo", "x") == [[0, "x"], [1, "x"]]
    first.close()
    assert len(groups()) == 1 and len(rank_processes()) == 2  # the first one's rank was here
    assert second.submit(StepPlan(step=7)).result(5).step == 7
    second.close()
    assert not groups()


def test_a_cluster_without_room_is_told_with_what_it_has_and_what_was_asked(make: Make) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        make(HERE, {"CPU": 4.0}, timeout_s=0.5).start()
    assert time.monotonic() - began < 2
    message = str(caught.value)
    for part in (
        "placement_group_timeout_s=0.5: asked for 2 bundle(s), PACK: {CPU: 1, here: 1}, {CPU: 4}",
        "{CPU: 2, here: 2}",
        "{CPU: 1, here: 0}",
        "free now, in all: {CPU: 3, here: 2}",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("bad@0", ModelError, "this is no model"),
        ("broken@1", WorkerError, "rank 1: ZeroDivisionError: unlucky"),
        ("dies@1", WorkerDied, "rank 1 ended"),
    ],
)
def test_a_failed_start_is_told_and_leaves_nothing(
    make: Make, model: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make(HERE, THERE, model=model).start()
    assert not groups()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_told_at_once(make: Make, rank: int) -> None:
    engine = make(HERE, THERE)
    pids = engine.start().pids
    future = engine.submit(StepPlan(step=0, releases=[SLEEP, 0, 60_000]))
    os.kill(pids[rank], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=f"rank {rank} ended"):
        future.result(30)
    assert time.monotonic() - began < 2


def test_a_stopped_rank_is_killed(make: Make) -> None:
    engine = make(HERE)
    engine.start()
    engine.submit(StepPlan(step=0, releases=[STOP, 0]))
    began = time.monotonic()
    engine.close(0.5)
    assert time.monotonic() - began < 4
    assert not rank_processes()


def test_ranks_end_with_the_engines_process(cluster: str) -> None:
    program = (
        "import os, signal; from test_ray import HERE, THERE, executor; engine = executor(HERE, THERE)\n"
        "engine.start(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "RAY_ADDRESS": cluster, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    # nothing_is_left says the rest


def in_group(*bundles: dict[str, float]) -> tuple[bool, list[int], list[str]]:
    """Of an engine in bundle 0 of two of a CPU each: whether it joined their group, its ranks' bundles, all groups."""

    @ray.remote(num_cpus=1)
    def engine() -> tuple[bool, list[int], list[str]]:
        group = Group(RayConfig(bundles=bundles))
        seats = group.wait()
        joined, states = group.handle == ray.util.get_current_placement_group(), groups()
        group.remove()
        return joined, [seat.bundle for seat in seats], states

    around = placement_group([HERE, {"CPU": 1.0}])
    try:
        return ray.get(engine.options(scheduling_strategy=PlacementGroupSchedulingStrategy(around, 0)).remote())
    finally:
        remove_placement_group(around)


def test_an_engine_joins_the_group_around_it_where_that_has_room() -> None:
    joined, bundles, all_groups = in_group({"CPU": 1.0})
    assert joined and bundles == [1] and len(all_groups) == 1


def test_an_engine_asks_for_a_group_of_its_own_where_the_one_around_it_is_full() -> None:
    joined, bundles, all_groups = in_group({"CPU": 0.5}, {"CPU": 0.5, "there": 0.5})
    assert not joined and bundles == [0, 1] and len(all_groups) == 2


@pytest.mark.parametrize("how", ["removed", "killed by Ray", "killed"])
def test_a_group_ends_with_the_actor_it_was_made_in(how: str) -> None:
    @ray.remote(num_cpus=0)
    class Engine:
        def __init__(self) -> None:
            self.group = Group(RayConfig(bundles=({"CPU": 1.0},)))

        def pid(self) -> int:
            self.group.wait()
            return os.getpid()

        def remove(self) -> None:
            self.group.remove()

    engine = Engine.remote()
    pid = ray.get(engine.pid.remote())
    assert len(groups()) == 1
    if how == "removed":
        ray.get(engine.remove.remote())
    elif how == "killed by Ray":
        ray.kill(engine)
    else:
        os.kill(pid, signal.SIGKILL)
    # nothing_is_left says the rest, but for the guard
    wait_until(lambda: ray.util.list_named_actors(all_namespaces=True), [])


def test_the_ranks_of_a_stage_share_a_node_where_one_has_the_room() -> None:
    def order(nodes: str, tensor_parallel_size: int) -> str:
        seats = [Seat(bundle, node, {}) for bundle, node in enumerate(nodes)]
        return "".join(f"{seat.node}{seat.bundle}" for seat in in_rank_order(seats, "h", tensor_parallel_size))

    assert order("abhab", 1) == "h2a0a3b1b4"
    assert order("ahbb", 2) == "b2b3h1a0"
    assert order("abhh", 2) == "h2h3a0b1"


def test_a_rank_computes_with_the_threads_of_the_config_at_the_engines_priority() -> None:
    @ray.remote(num_cpus=1)
    def surroundings(ticket: bytes, engine: int) -> tuple[str | None, int]:
        RankActor().prepare(ticket, engine)
        return os.environ.get("OMP_NUM_THREADS"), os.getpriority(os.PRIO_PROCESS, 0)

    device = DeviceConfig(threads=3)
    ticket = Ticket(rank=0, config=EngineConfig(model=ModelConfig(path="", served_model_name=""), device=device))
    assert ray.get(surroundings.remote(ticket.encode(), os.getpid())) == ("3", 0)
