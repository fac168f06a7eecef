"""The executor contract: where the model step runs."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

from headway.messages import StepPlan, StepResult, WorkerInfo


class Executor(Protocol):
    """Runs plans in the order they are submitted; at most pipeline_parallel_size + depth are outstanding.

    An exception in a step reaches its future as WorkerError; every later call raises EngineDead.
    """

    in_process: bool
    """call() takes any object; elsewhere what MessagePack has."""

    def start(self) -> WorkerInfo:
        """Loads the model; returns when the first plan can be submitted. One that raises has closed the executor."""
        ...

    def submit(self, plan: StepPlan) -> Future[StepResult]: ...

    def mask(self, step: int, masks: dict[int, bytes]) -> None:
        """Token masks for a step's masked_slots: slot to packed bits (bit t of the little-endian row: token t allowed).

        The step's forward pass runs meanwhile; its sampling waits for this.
        """
        ...

    def call(self, method: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Runs a worker method between steps, on every worker. Raises what one raised, and TimeoutError.

        Without a timeout, workers in other processes that take longer than start_timeout_s end the engine.
        """
        ...

    def health(self) -> None:
        """Raises what is wrong, if anything is."""
        ...

    def close(self, timeout: float = 5.0) -> None:
        """Idempotent; leaves nothing behind."""
        ...
