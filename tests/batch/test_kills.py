"""Jobs that are killed at any moment and run again: every row is in the output once, in order, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.batch.ledger import HeldRows, Ledger
from headway.batch.sinks import Sink, open_sink

KILLED = -signal.SIGKILL
ROWS = 16  # twice what the stage answers at a time
FORMATS = ["jsonl", "csv", "parquet", "arrow"]
EVERY = [  # Arrow takes longer to start and to end
    ("jsonl", 1),
    ("csv", 1),
    ("parquet", 5),
    pytest.param("parquet", 1, marks=pytest.mark.long),
    pytest.param("arrow", 1, marks=pytest.mark.long),
]
SCRIPT = Path(__file__).with_name("killable.py")


def failing(index: int) -> bool:
    return index % 7 == 3


class Workplace:
    """A folder with an input, and a process that runs jobs on it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path, rows: int, kind: str = "jsonl") -> None:
        self.process, self.folder, self.rows, self.kind = process, folder, rows, kind
        self.source, self.target = folder / "in.jsonl", folder / f"out.{kind}"
        self.errors, self.computed = folder / "failed.jsonl", folder / "computed"
        self.source.write_text("".join(json.dumps({"id": i, "text": f"row {i}"}) + "\n" for i in range(rows)))

    def run(self, *, resume: bool = True, retry_failed: bool = False, **spec: Any) -> int:
        options = {"resume": resume, "retry_failed": retry_failed, "errors": str(self.errors)}
        paths = {"source": str(self.source), "target": str(self.target), "computed": str(self.computed)}
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"seed": 1, "options": options, **paths, **spec}), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def committed(self) -> set[int]:
        """What the ledger says need not be answered again."""
        known = {"model": "m", "output_format": self.kind, "errors": str(self.errors)}
        state = Ledger(self.target, known).load()
        if state is None:
            return set()
        return {*range(state.rows), *HeldRows(self.target, self.sink(), state.held).load()}

    def sink(self) -> Sink:
        return open_sink(str(self.target), self.kind)

    def answered(self) -> list[int]:
        """In the order in which that happened, of all runs since the last call."""
        if not self.computed.exists():
            return []
        ids = [int(line) for line in self.computed.read_text().splitlines()]
        self.computed.unlink()
        return ids

    def check(self, mended: bool = False) -> None:
        rows = list(self.sink().published())
        assert [int(row["id"]) for row in rows] == list(range(self.rows))
        bad = [i for i in range(self.rows) if failing(i) and not mended]
        assert [int(row["id"]) for row in rows if row.get("error")] == bad
        assert all(row["answer"] == f"to row {row['id']}" for row in rows if not row.get("error"))
        errors = [json.loads(line) for line in self.errors.read_text().splitlines()]
        assert [row["id"] for row in errors] == bad
        left = {path.name for path in self.folder.iterdir()} - {"computed"}
        assert left == {self.source.name, self.target.name, self.errors.name, self.target.name + ".ledger"}


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin
        process.stdin.close()


def places(process: subprocess.Popen[str], folder: Path, kind: str, step: int) -> Iterator[tuple[int, Workplace]]:
    """The call at which a run is to be killed, and where."""
    for point in itertools.count(step, step):
        (folder / str(point)).mkdir()
        yield point, Workplace(process, folder / str(point), rows=ROWS, kind=kind)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("kind", "step"), EVERY)
def test_a_kill_at_every_call_that_changes_the_disk(process, kind: str, step: int, after: bool, tmp_path: Path) -> None:
    """Each run is killed further on than the run before it; what it committed is not answered again."""
    point = 0
    for point, place in places(process, tmp_path, kind, step):
        killed = place.run(crash_at=point, after=after) == KILLED
        place.answered()
        done = place.committed()
        assert place.run() == 0
        assert not done & set(place.answered())
        place.check()
        if not killed:
            break
    assert point > 15


@pytest.mark.parametrize(("kind", "step"), EVERY)
def test_a_kill_at_every_call_of_a_retry(process, kind: str, step: int, tmp_path: Path) -> None:
    """The earlier output is there until the new one is; rows that had an answer are not answered again."""
    point = 0
    for point, place in places(process, tmp_path, kind, step):
        assert place.run(resume=False) == 0
        place.answered()
        killed = place.run(retry_failed=True, mended=True, crash_at=point) == KILLED
        assert [int(row["id"]) for row in place.sink().published()] == list(range(ROWS))
        assert place.run(retry_failed=True, mended=True) == 0
        assert all(failing(i) for i in place.answered())
        place.check(mended=True)
        if not killed:
            break
    assert point > 10


@settings(max_examples=8, deadline=None)
@given(
    kind=st.sampled_from(FORMATS),
    rows=st.integers(0, 120),
    window=st.integers(1, 20),
    kills=st.lists(st.tuples(st.integers(1, 120), st.booleans(), st.integers(0, 99)), max_size=5),
)
def test_kills_one_after_the_other(process, kind: str, rows: int, window: int, kills: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Workplace(process, Path(folder), rows, kind)
        for point, after, seed in kills:
            done = place.committed()
            place.run(crash_at=point, after=after, seed=seed, window=window)
            assert not done & set(place.answered())
            assert place.committed() >= done
        assert place.run(window=window) == 0
        place.check()


@pytest.mark.parametrize(("kind", "step"), [("jsonl", 47), ("csv", 47), ("parquet", 997)])
def test_a_disk_that_is_full_at_any_byte(process, kind: str, step: int, tmp_path: Path) -> None:
    """Until the job can be done; what was committed while there was room is not answered again."""
    place, size = Workplace(process, tmp_path, rows=ROWS, kind=kind), 300
    while True:
        done = place.committed()
        status = place.run(file_size=size, seed=size)
        assert not done & set(place.answered())
        if status == 0:
            break
        size += step
    place.check()


@pytest.mark.parametrize("kind", FORMATS)
def test_kills_from_outside_at_any_moment(process, kind: str, tmp_path: Path) -> None:
    place, runs = Workplace(process, tmp_path, rows=2000, kind=kind), 0
    while place.run(kill_after_s=0.01 * 1.2**runs, flush_interval_s=0.002, seed=runs) == KILLED:
        runs += 1
    place.check()
