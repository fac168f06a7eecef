"""Kernels behind one port; implementations load only when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.errors import ConfigError

if TYPE_CHECKING:
    from headway.ops.port import Ops


def get_ops(name: str, *, threads: int = 1, isa: str = "auto") -> Ops:
    """The implementation of that name, with that many threads; isa: instruction set of the cpu kernels.

    Raises ConfigError for an unknown name, or kernels this machine lacks.
    """
    if name == "reference":
        from headway.ops.reference import ReferenceOps

        return ReferenceOps(threads=threads)
    if name == "cpu":
        from headway.ops.cpu import CpuOps

        return CpuOps(threads=threads, isa=isa)
    raise ConfigError("ops", name, "must be one of: reference, cpu")
