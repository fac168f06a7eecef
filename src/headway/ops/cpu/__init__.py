"""The C++ kernels for CPUs."""

from headway.ops.cpu.ops import CpuOps

__all__ = ["CpuOps"]
