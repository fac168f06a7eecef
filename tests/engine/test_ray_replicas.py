"""Replicas on nodes of a Ray cluster: the head has the address of this machine, the others have 127.0.0.2 and on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from tests.server.conftest import Served

from headway import LLM, AsyncLLM, SamplingParams
from headway.engine.ray_launcher import node_of
from headway.errors import ConfigError, EngineDead, EngineError, ModelError
from headway.executor.ray import placement
from headway.llm.frontend import find
from headway.llm.replicas import start_engines

NODE: dict[str, Any] = {"object_store_memory": 80 << 20}
PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
WAIT_S = 30.0


@pytest.fixture(scope="module")
def cluster() -> Generator[Cluster]:
    """Four CPUs on the head node, four on the other one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        head = {"num_cpus": 4, "resources": {"room": 1}, "include_dashboard": False, **NODE}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=4, node_ip_address="127.0.0.2", **NODE)
    ray.init(cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Cluster) -> Generator[None]:
    yield
    wait_until(lambda: (groups(), replica_processes()), ([], []))


@pytest.fixture
def settings(tiny_opt: Path) -> dict[str, Any]:
    model = {"model": str(tiny_opt), "load_format": "dummy", "max_model_len": 512, "threads": 1, "max_num_seqs": 16}
    return {**model, "data_parallel_size": 2, "data_parallel_backend": "ray"}


def wait_until(state: Callable[[], Any], wanted: object) -> None:
    """Ray ends processes, and frees what they held, in its own time."""
    deadline = time.monotonic() + WAIT_S
    while (now := state()) != wanted:
        assert time.monotonic() < deadline, now
        time.sleep(0.01)


def groups() -> list[dict[str, Any]]:
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def replica_processes() -> list[int]:
    def command(pid: str) -> bytes:
        try:
            return Path("/proc", pid, "cmdline").read_bytes()
        except OSError:
            return b""

    return [int(p) for p in os.listdir("/proc") if p.isdigit() and command(p).startswith(b"ray::ReplicaActor")]


def places() -> list[str]:
    """The address of each replica's node; a replica is one group, on one node."""
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = [set(group["bundles_to_node_id"].values()) for group in groups()]
    assert all(len(of_group) == 1 for of_group in nodes)
    return sorted(address[node] for (node,) in nodes)


def head(cluster: Cluster) -> str:
    return str(cluster.address).rpartition(":")[0]


async def tokens(llm: AsyncLLM, prompt: list[int], **options: Any) -> list[int]:
    return [t async for d in llm.generate(prompt, PARAMS, **options) for t in d.outputs[0].token_ids]


async def up(llm: AsyncLLM, *wanted: bool) -> None:
    deadline = time.monotonic() + WAIT_S
    while [health.up for health in llm.health()] != list(wanted):
        assert time.monotonic() < deadline, llm.health()
        await asyncio.sleep(0.01)


def test_four_replicas_go_where_there_is_room(cluster: Cluster, settings: dict[str, Any]) -> None:
    two_cpus = {"bundle_per_worker": {"CPU": 2}}
    settings["data_parallel_size"] = 4
    with LLM(**settings, placement_group_config=two_cpus) as llm:
        assert places() == sorted([head(cluster), head(cluster), "127.0.0.2", "127.0.0.2"])
        assert {group["strategy"] for group in groups()} == {"STRICT_PACK"}
        assert sorted(llm.executor_info.pids) == sorted(replica_processes())


async def test_some_replicas_are_on_the_head_node_and_the_others_elsewhere(
    cluster: Cluster, settings: dict[str, Any]
) -> None:
    supervisor, seat = start_engines(find(**settings, data_parallel_size_local=1, data_parallel_address=head(cluster)))
    here, there = (ready.address.endpoint for ready in supervisor.ready)
    assert here.startswith("ipc://@"), "nothing listens on the network where nobody has to come from there"
    assert there.startswith("tcp://127.0.0.2:")
    async with AsyncLLM.over(seat.frontend(), supervisor.client()) as llm:
        assert places() == sorted([head(cluster), "127.0.0.2"])
        answers = [await tokens(llm, [5, 6], data_parallel_rank=rank) for rank in (0, 1)]
        assert len(answers[0]) == 8 and answers[0] == answers[1]


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"distributed_executor_backend": "mp", "tensor_parallel_size": 2}, marks=pytest.mark.long),
        pytest.param({"distributed_executor_backend": "ray", "tensor_parallel_size": 2}, marks=pytest.mark.long),
    ],
)
async def test_none_is_on_the_head_node(cluster: Cluster, settings: dict[str, Any], ranks: dict[str, Any]) -> None:
    async with AsyncLLM(**settings, data_parallel_size_local=0, **ranks) as llm:
        assert places() == ["127.0.0.2", "127.0.0.2"]
        answers = [await tokens(llm, [7, 8], data_parallel_rank=rank) for rank in (0, 1)]
        assert len(answers[0]) == 8 and answers[0] == answers[1]


def test_a_node_has_many_names(cluster: Cluster) -> None:
    nodes = {node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for name in (None, "localhost", "127.0.0.1", os.uname().nodename, head(cluster)):
        assert node_of(name) == nodes[head(cluster)]
    assert node_of("127.0.0.2") == nodes["127.0.0.2"]


def test_an_address_of_no_node_is_refused_with_the_nodes(cluster: Cluster, settings: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"data_parallel_address='192\.0\.2\.77': is no node of the cluster"
    ) as caught:
        LLM(**settings, data_parallel_size_local=1, data_parallel_address="192.0.2.77")
    assert f"node {head(cluster)} (" in str(caught.value) and "node 127.0.0.2 (" in str(caught.value)


def test_a_cluster_without_room_is_told_with_what_it_has_and_what_was_asked(settings: dict[str, Any]) -> None:
    settings["data_parallel_size"] = 3
    with pytest.raises(EngineError) as caught:
        LLM(
            **settings,
            data_parallel_size_local=0,
            placement_group_config={"bundle_per_worker": {"CPU": 3}},
            placement_group_timeout_s=1,
        )
    message = str(caught.value)
    for part in (
        "Ray had no room for replica",
        "within placement_group_timeout_s=1",
        "1 bundle(s), STRICT_PACK: {CPU: 3}",
    ):
        assert part in message
    assert " not on node " in message and "node 127.0.0.2 (" in message and "{CPU: 4}" in message


@pytest.mark.long
def test_what_no_replica_can_load_is_the_callers_error(
    settings: dict[str, Any], tmp_path: Path, tiny_opt: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_opt / "config.json").read_bytes())
    with pytest.raises(ModelError):
        LLM(**settings | {"model": str(tmp_path), "load_format": "auto"})


async def test_replicas_wait_for_a_node_and_outlive_it(
    cluster: Cluster, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(placement, "_SILENT_S", 0.1)
    elsewhere: dict[str, Any] = {
        "data_parallel_size_local": 1,
        "placement_group_config": {"bundle_per_worker": {"room": 1}},
    }
    starting = asyncio.create_task(asyncio.to_thread(AsyncLLM, **settings, **elsewhere))
    while (
        not starting.done()
        and "replica 1 waits up to placement_group_timeout_s=300 for Ray: asked for 1 bundle" not in caplog.text
    ):
        await asyncio.sleep(0.01)
    late = room_at(cluster, "127.0.0.3")
    async with await starting as llm:
        assert places() == sorted([head(cluster), "127.0.0.3"])
        cluster.remove_node(late, allow_graceful=False)
        await up(llm, True, False)
        with pytest.raises(EngineDead, match="replica 1 does not run: "):
            await tokens(llm, [1, 2], data_parallel_rank=1)
        assert len(await tokens(llm, [1, 2])) == 8
        other = room_at(cluster, "127.0.0.4")
        await up(llm, True, True)
        assert places() == sorted([head(cluster), "127.0.0.4"])
        assert len(await tokens(llm, [1, 2], data_parallel_rank=1)) == 8
    cluster.remove_node(other)


def room_at(cluster: Cluster, address: str) -> Any:
    return cluster.add_node(num_cpus=1, node_ip_address=address, resources={"room": 1}, **NODE)


async def test_a_replica_whose_actor_dies_starts_again_in_a_new_group(settings: dict[str, Any]) -> None:
    async with AsyncLLM(**settings) as llm:
        before = {group["placement_group_id"] for group in groups()}
        os.kill(llm.executor_info.pids[0], signal.SIGKILL)
        await up(llm, False, True)
        while "its actor has ended: " not in (
            why := llm.health()[0].why
        ):  # Ray's news may come after the connection's end
            assert why == "the connection was lost"
            await asyncio.sleep(0.01)
        assert len(await tokens(llm, [1, 2])) == 8
        await up(llm, True, True)
        after = {group["placement_group_id"] for group in groups()}
        assert len(after) == 2 and len(before & after) == 1
        assert len(await tokens(llm, [1, 2], data_parallel_rank=0)) == 8


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL])
def test_replicas_end_with_the_server(cluster: Cluster, tiny_opt: Path, number: signal.Signals) -> None:
    words = [str(tiny_opt), "--load-format", "dummy", "--max-model-len", "512", "--threads", "1"]
    server = Served(*words, "-dp", "2", "-dpl", "0", "-dpb", "ray", "--ray-address", str(cluster.address))
    assert places() == ["127.0.0.2", "127.0.0.2"]
    body = json.dumps({"model": str(tiny_opt), "prompt": [5, 6], "max_tokens": 4, "ignore_eos": True}).encode()
    request = Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=WAIT_S) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] == 4
    assert server.end(number) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    # nothing_is_left says the rest
