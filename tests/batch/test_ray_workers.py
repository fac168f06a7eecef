"""What Ray Data's actors hold, without Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("ray.data")


def test_a_worker_that_lives_as_long_as_its_process_lets_it_end() -> None:
    """Python collects what is left in cycles once no other thread runs any more."""
    program = (
        "import builtins\n"
        "from headway.batch.ray.workers import FlowWorker, Work\n"
        "cycle = [FlowWorker(Work(specs=[], last=True, continues=True))]\n"
        "cycle.append(cycle)\n"
        "builtins.kept = cycle\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
