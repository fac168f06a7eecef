"""Decides what runs in each step: requests in, step plans out; step results in, outputs out."""

from headway.scheduler.scheduler import Scheduler
from headway.scheduler.stats import EngineStats

__all__ = ["EngineStats", "Scheduler"]
