"""Settings: frozen dataclasses, one per owner, and resolve(), the only place where automatic choices are made."""

from headway.config.args import EngineArgs
from headway.config.facts import ModelFacts
from headway.config.machine import MachineFacts, machine_facts
from headway.config.resolve import resolve
from headway.config.settings import (
    CacheConfig,
    Choice,
    DeviceConfig,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RayConfig,
    SchedulerConfig,
)

__all__ = [
    "CacheConfig",
    "Choice",
    "DeviceConfig",
    "EngineArgs",
    "EngineConfig",
    "MachineFacts",
    "ModelConfig",
    "ModelFacts",
    "ParallelConfig",
    "RayConfig",
    "SchedulerConfig",
    "machine_facts",
    "resolve",
]
