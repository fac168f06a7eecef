"""Settings: frozen dataclasses, one per owner, and resolve(), the only place where automatic choices are made."""

from headway.config.settings import (
    CacheConfig,
    Choice,
    DeviceConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
)

__all__ = ["CacheConfig", "Choice", "DeviceConfig", "EngineConfig", "ModelConfig", "ParallelConfig", "SchedulerConfig"]
