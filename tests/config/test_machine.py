from __future__ import annotations

import os

from headway.config import machine
from headway.config.machine import Launched, machine_facts


def test_this_machine_has_cores_and_memory() -> None:
    facts = machine_facts()
    assert 1 <= facts.cores <= (os.cpu_count() or 1)
    assert facts.free_memory > 1 << 20
    assert facts.isas[-1] == "portable"


def test_instruction_sets_are_read_best_first() -> None:
    avx2 = "processor : 0\nflags\t\t: fpu avx2 fma f16c\n"
    assert machine._isas(avx2) == ("avx2", "portable")
    assert machine._isas(avx2.replace("\n", " avx512f avx512bw avx512vl avx512dq\n")) == ("avx512", "avx2", "portable")
    assert machine._isas("Features : fp asimd\n") == ("portable",)


def test_a_cgroup_quota_counts_as_cpus() -> None:
    assert machine._quota("150000 100000\n") == 1.5
    assert machine._quota("max 100000\n") is None
    assert machine._quota("") is None


def test_affinity_bounds_the_cores() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert machine_facts().cores == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_omp_num_threads_is_reported_where_set(monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert machine_facts().omp_num_threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert machine_facts().omp_num_threads is None


def test_what_torchrun_says_is_read_where_it_is_whole(monkeypatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert machine_facts().launched is None
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert machine_facts().launched == Launched(rank=1, world_size=4, local_rank=1, local_world_size=4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine_facts().launched == Launched(rank=1, world_size=4, local_rank=1, local_world_size=2)
