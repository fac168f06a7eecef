"""Ranks that torchrun starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def torchrun(size: int, command: Sequence[str], timeout_s: float = 90, **options: Any) -> None:
    """Runs a Python command as so many ranks, of which none is left whatever happens."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    with subprocess.Popen([*launch, "--master-port", str(free_port()), *command], **options) as launcher:
        try:
            assert launcher.wait(timeout_s) == 0
        except BaseException:
            end(launcher)
            raise


def end(launcher: subprocess.Popen[bytes]) -> None:
    """Its ranks too: each leads a session of its own, which the launcher's end does not reach."""
    ranks = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    pids = list(map(int, ranks.read_text().split())) if ranks.exists() else []
    launcher.kill()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
