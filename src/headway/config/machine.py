"""What this machine offers to this process. Reads files and system calls only: no torch, no library of the device."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Isa = Literal["avx512bf16", "avx512", "avx2", "portable"]

ISA_FLAGS: dict[Isa, frozenset[str]] = {
    "avx512bf16": frozenset(
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "avx2", "fma", "f16c")
    ),
    "avx512": frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma", "f16c")),
    "avx2": frozenset(("avx2", "fma", "f16c")),
    "portable": frozenset(),
}
"""Best first: what /proc/cpuinfo must list for each instruction set of the cpu kernels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What torchrun, or a launcher that speaks like it, tells each process it starts. Local: among those of a node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """cores: CPUs this process may use, by affinity and cgroup quota. free_memory: bytes, within the cgroup's limit.

    isas: instruction sets the cpu kernels may use, best first. has_cpu_kernels: the compiled kernels are installed.
    omp_num_threads: of the environment, if it is set. ray: whether a cluster is at hand, or this process even runs
    inside a placement group.
    """

    cores: int
    free_memory: int
    isas: tuple[Isa, ...]
    has_cpu_kernels: bool
    has_gpu: bool = False
    omp_num_threads: int | None = None
    launched: Launched | None = None
    ray: Literal["cluster", "placement_group"] | None = None


def machine_facts() -> MachineFacts:
    kernels = Path(__file__).parents[1] / "ops" / "cpu"
    omp = os.environ.get("OMP_NUM_THREADS", "")
    return MachineFacts(
        cores=_cores(),
        free_memory=_free_memory(),
        isas=_isas(_read(Path("/proc/cpuinfo"))),
        has_cpu_kernels=any(kernels.glob("_kernels*.so")),
        has_gpu=Path("/proc/driver/nvidia/version").exists(),
        omp_num_threads=int(omp) if omp.isdigit() and int(omp) > 0 else None,
        launched=_launched(),
        ray=_ray(),
    )


def _launched() -> Launched | None:
    values = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if not (all(v.isdigit() for v in values) and os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        return None
    rank, world_size, local_rank = map(int, values)
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return Launched(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=int(local) if local.isdigit() else world_size,
    )


def _ray() -> Literal["cluster", "placement_group"] | None:
    """Without importing ray: whoever runs inside Ray has done so."""
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return "cluster" if ray.util.get_current_placement_group() is None else "placement_group"
    return "cluster" if os.environ.get("RAY_ADDRESS") and importlib.util.find_spec("ray") else None


def _isas(cpuinfo: str) -> tuple[Isa, ...]:
    line = next((x for x in cpuinfo.splitlines() if x.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return tuple(isa for isa, needed in ISA_FLAGS.items() if needed <= flags)


def _cores() -> int:
    affinity = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1
    quotas = [_quota(_read(d / "cpu.max")) for d in _cgroups()]
    return max(1, min([affinity, *(int(q) for q in quotas if q is not None)]))


def _quota(cpu_max: str) -> float | None:
    """CPUs of a cgroup's cpu.max ("200000 100000"); None without a limit."""
    quota, _, period = cpu_max.strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _free_memory() -> int:
    meminfo = dict(line.split(":", 1) for line in _read(Path("/proc/meminfo")).splitlines() if ":" in line)
    if "MemAvailable" in meminfo:
        free = int(meminfo["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return min([free, *(left for d in _cgroups() if (left := _memory_left(d)) is not None)])


def _memory_left(cgroup: Path) -> int | None:
    """Bytes below a cgroup's limit; the page cache it could drop does not count as used. None without a limit."""
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    if not (limit.isdigit() and used.isdigit()):
        return None
    stat = dict(line.split(" ", 1) for line in _read(cgroup / "memory.stat").splitlines() if " " in line)
    return max(0, int(limit) - int(used) + int(stat.get("inactive_file", 0)))


def _cgroups() -> list[Path]:
    """This process's cgroup (version 2) and those above it: each may set a limit."""
    root = Path("/sys/fs/cgroup")
    entry = next((x for x in _read(Path("/proc/self/cgroup")).splitlines() if x.startswith("0::")), "0::/")
    own = root / entry[3:].strip().lstrip("/")
    return [own, *(p for p in own.parents if p == root or root in p.parents)]


def _read(path: Path) -> str:
    """A file's text, empty where the system has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
