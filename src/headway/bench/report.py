"""What every measurement says of itself, and where it goes."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.engine import StepTimes
    from headway.executor import WorkerInfo
    from headway.llm.frontend import Client

PACKAGES = ("headway", "torch", "numpy", "tokenizers")


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def peak_rss_mb(info: WorkerInfo) -> float | None:
    """The most memory that this process and the workers' have held, each at its time, in 10^6 bytes.

    Pages that they share count for each. None where workers are other nodes' processes, or /proc does not say.
    """
    if info.executor == "ray":
        return None
    try:
        return round(sum(_peak_rss_kib(pid) for pid in {os.getpid(), *info.pids}) * 1024 / 1e6, 1)
    except OSError:
        return None


def tree_peak_rss_mb() -> float | None:
    """As peak_rss_mb, of this process and all that it started and that still run."""
    pids, children = [os.getpid()], "/proc/{0}/task/{0}/children"
    try:
        for pid in pids:  # which grows meanwhile
            pids += map(int, Path(children.format(pid)).read_text().split())
        return round(sum(map(_peak_rss_kib, pids)) * 1024 / 1e6, 1)
    except OSError:
        return None


def _peak_rss_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    if "VmHWM:" not in status:
        raise ProcessLookupError(f"process {pid} has ended")  # and nobody has waited for it yet
    return int(status.partition("VmHWM:")[2].split()[0])


def process_age_s() -> float | None:
    """Seconds since this process started, to the kernel's tick (10 ms); None where /proc does not say."""
    try:
        stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except OSError:
        return None
    return uptime - int(stat[19]) / os.sysconf("SC_CLK_TCK")


def check_file(path: str | None, setting: str = "json") -> None:
    """Fails before the measurement rather than after it."""
    if path is not None and not Path(path).parent.is_dir():
        raise ConfigError(setting, path, "its directory does not exist")


def engine_facts(llm: Client[Any]) -> dict[str, Any]:
    """What ran."""
    return {
        "executor": llm.executor_info.executor,
        "async_scheduling": llm.config.scheduler.depth == 1,
        "enable_prefix_caching": llm.config.cache.enable_prefix_caching,
        "threads": llm.executor_info.threads,
        "kernels": llm.executor_info.kernels,
        "dtype": llm.config.model.dtype,
        "quantization": llm.config.model.quantization,
        "versions": versions(),
    }


def accounting(times: StepTimes) -> dict[str, Any]:
    """Where the time went: shares of that in which there was work (see StepTimes)."""
    return {
        "steps": times.steps,
        "executor_tax": round(times.executor_tax, 5),
        "shares": {name: round(share, 5) for name, share in times.shares().items()},
    }


def spoken(accounting: dict[str, Any]) -> str:
    """Of accounting(), for people."""
    shares = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in accounting["shares"].items())
    return f"executor tax {accounting['executor_tax']:.2%} over {accounting['steps']} steps ({shares})"


def publish(report: dict[str, Any], path: str | None) -> None:
    """Prints one line of JSON, and the accounting for people; writes the JSON to a file too where one is named."""
    print(f"headway: {spoken(report)}", file=sys.stderr)
    print(json.dumps(report), flush=True)
    if path is not None:
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def percentiles(values: list[float], points: tuple[int, ...] = (50, 90, 99)) -> dict[str, float]:
    """Nearest-rank percentiles, which are values that were measured."""
    ordered = sorted(values)
    return {f"p{p}": round(ordered[max(0, -(-len(ordered) * p // 100) - 1)], 3) for p in points}
