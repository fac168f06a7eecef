"""Kernels behind one port; implementations load only when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.ops.port import Ops


def get_ops(name: str, *, threads: int = 1) -> Ops:
    """The implementation of that name, computing with that many threads. Raises ConfigError for an unknown name."""
    if name == "reference":
        from headway.ops.reference import ReferenceOps

        return ReferenceOps(threads=threads)
    if name == "cpu":
        from headway.ops.cpu import CpuOps

        return CpuOps(threads=threads)
    raise ConfigError("ops", name, "must be one of: reference, cpu")
