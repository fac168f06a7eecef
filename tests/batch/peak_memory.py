"""Runs a job of so many rows, and prints the most memory that was resident, in megabytes."""

from __future__ import annotations

import asyncio
import resource
import sys

from headway.batch.flow import Fail, Flow
from headway.batch.job import Job, JobOptions, run
from headway.batch.row import Done, Row


class Echo:
    name = "echo"
    window = 512

    async def open(self, fail: Fail) -> None:
        pass

    def submit(self, rows: list[Row], done: Done) -> None:
        for row in rows:
            row.data["generated_text"] = f"an answer to {row.data['prompt']}"
        asyncio.get_running_loop().call_soon(done, rows)

    async def close(self) -> None:
        pass


if __name__ == "__main__":
    rows = ({"id": i, "prompt": f"this is row {i}"} for i in range(int(sys.argv[1])))
    run(Job(rows, sys.argv[2], JobOptions(progress=False), {}), Flow([Echo()]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
