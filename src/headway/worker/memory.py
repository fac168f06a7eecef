"""How many KV blocks fit on the host."""

from __future__ import annotations

from pathlib import Path

from headway.errors import ConfigError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
_SHARE = 0.5  # of what is free; the rest is for activations, logits, the front end and other processes


def choose_num_blocks(bytes_per_block: int, blocks_per_sequence: int, max_num_seqs: int, free_bytes: int) -> int:
    """As many blocks as the slots could ever fill, within a share of the free memory; one more is the padding block.

    Raises ConfigError if one sequence of max_model_len does not fit.
    """
    fit = int(free_bytes * _SHARE) // bytes_per_block
    if fit <= blocks_per_sequence:
        needed = (blocks_per_sequence + 1) * bytes_per_block
        raise ConfigError(
            "max_model_len",
            f"{blocks_per_sequence} KV blocks",
            f"one sequence needs {needed >> 20} MiB, {int(free_bytes * _SHARE) >> 20} MiB may be used: lower it",
        )
    return min(fit, max_num_seqs * blocks_per_sequence + 1)


def free_bytes(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int:
    """Memory that can be taken without swapping: the kernel's estimate, or what the control group leaves if less."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = _read_number(cgroup / "memory.max")
    if limit is not None:
        free = min(free, limit - (_read_number(cgroup / "memory.current") or 0))
    return free


def _read_number(path: Path) -> int | None:
    """None where the file is missing (no version 2 control group) or says "max"."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
