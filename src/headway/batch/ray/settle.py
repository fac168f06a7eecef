"""What Ray does to a worker process, undone."""

from __future__ import annotations

import os
from contextlib import suppress


def settle_in() -> None:
    """Threads as this machine has cores, not as the actor has reserved; a priority not below every other process's."""
    os.environ.pop("OMP_NUM_THREADS", None)  # before torch is imported
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)
