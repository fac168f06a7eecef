"""Executes step plans on one rank."""

from headway.worker.worker import Worker

__all__ = ["Worker"]
