"""The local runner over stages that answer when they are told to."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.batch.durable import AppendedFile
from headway.batch.flow import MIN_WINDOW, Fail, Flow
from headway.batch.job import Job, JobOptions, Summary, run
from headway.batch.ledger import Answer, HeldRows
from headway.batch.pump import WINDOWS_AHEAD
from headway.batch.row import Done, Row
from headway.batch.sinks import JsonLines
from headway.errors import ConfigError, RowFailed

WINDOW = MIN_WINDOW
DONE = 2 * WINDOW
"""Rows that are done when a stage breaks at row 150: it is given one window after the other."""

FOREVER = 1e9  # seconds between commits: only the last one is made


class Answers:
    """Answers every row at once. change: what it does to a row. ran: the rows' ids."""

    name = "answers"

    def __init__(self, change: Callable[[Row], None] = lambda row: None, window: int = WINDOW) -> None:
        self.window, self.change = window, change
        self.ran: list[int] = []
        self.opened = 0

    async def open(self, fail: Fail) -> None:
        self.opened += 1
        self.fail = fail

    def submit(self, rows: list[Row], done: Done) -> None:
        asyncio.get_running_loop().call_soon(self._answer, rows, done)

    def _answer(self, rows: list[Row], done: Done) -> None:
        for row in rows:
            self.ran.append(row.data["id"])
            try:
                self.change(row)
            except Exception as error:
                row.fail(error, self.name)
        done(rows)

    async def close(self) -> None:
        pass


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": i} for i in range(count)]


def do(
    source: Path | Iterable[dict[str, Any]],
    target: Path,
    stage: Any = None,
    *,
    fingerprint: dict[str, Any] | None = None,
    stops: bool = False,
    **options: Any,
) -> Summary:
    settings = JobOptions(progress=False, **{"flush_interval_s": FOREVER, **options})
    return run(Job(source, target, settings, fingerprint or {"model": "m"}, stops), Flow([stage or Answers()]))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ids(path: Path) -> list[int]:
    return [row["id"] for row in records(path)]


def fails_on(*bad: int) -> Callable[[Row], None]:
    def change(row: Row) -> None:
        if row.data["id"] in bad:
            raise ValueError("no")
        row.data["answer"] = "yes"

    return change


class Breaks(Answers):
    """Ends the job at a row."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _answer(self, rows: list[Row], done: Done) -> None:
        if any(row.data["id"] == self.at for row in rows):
            self.fail(RuntimeError("the engine is gone"))
        else:
            super()._answer(rows, done)


class FirstIsSlow(Answers):
    """The first row waits until nothing has come for some turns of the event loop."""

    def __init__(self) -> None:
        super().__init__()
        self.seen_before_first = 0
        self.first: tuple[Row, Done] | None = None
        self.quiet = 0

    def _answer(self, rows: list[Row], done: Done) -> None:
        if rows[0].index == 0:
            self.first = rows.pop(0), done
            self.seen_before_first += 1
            self._wait()
        if self.first:
            self.quiet = 0
            self.seen_before_first += len(rows)
        super()._answer(rows, done)

    def _wait(self) -> None:
        assert self.first
        self.quiet += 1
        if self.quiet < 10:
            asyncio.get_running_loop().call_soon(self._wait)
        else:
            (row, done), self.first = self.first, None
            super()._answer([row], done)


def test_rows_are_answered_ahead_of_a_slow_one_but_only_so_far(tmp_path: Path) -> None:
    read = 0

    def source() -> Iterator[dict[str, Any]]:
        nonlocal read
        for row in rows(3000):
            read += 1
            yield row

    stage = FirstIsSlow()
    do(source(), tmp_path / "out.jsonl", stage)
    assert stage.seen_before_first == WINDOWS_AHEAD * WINDOW
    assert ids(tmp_path / "out.jsonl") == list(range(3000))


def test_a_row_that_fails_is_its_columns_and_an_error_and_goes_to_the_errors_too(tmp_path: Path) -> None:
    out, errors = tmp_path / "out.jsonl", tmp_path / "failed.jsonl"
    summary = do(rows(5), out, Answers(fails_on(1, 3)), errors=errors)
    error = {"type": "ValueError", "message": "no", "stage": "answers"}
    assert records(out)[:2] == [{"id": 0, "answer": "yes"}, {"id": 1, "error": error}]
    assert records(errors) == [{"id": 1, "error": error}, {"id": 3, "error": error}]
    assert (summary.tally.rows, summary.tally.failed, summary.tally.first_error) == (5, 2, "row 2: ValueError: no")
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "failed.jsonl"}


def test_a_row_that_cannot_be_stored_fails_alone(tmp_path: Path) -> None:
    def change(row: Row) -> None:
        row.data["answer"] = object() if row.data["id"] == 1 else "yes"

    for name in ("out.jsonl", "out.parquet"):
        assert do(rows(3), tmp_path / name, Answers(change)).tally.failed == 1
    with pytest.raises(RowFailed, match="row 2: "):
        do(rows(3), tmp_path / "stopped.jsonl", Answers(change), stops=True)
    assert ids(tmp_path / "stopped.jsonl.partial") == [0]
    bad = records(tmp_path / "out.jsonl")[1]
    assert (bad["error"]["stage"], bad["error"]["type"]) == ("output", "TypeError")


def test_the_column_for_errors_is_not_the_stages(tmp_path: Path) -> None:
    def change(row: Row) -> None:
        row.data["error"] = "mine" if row.data["id"] == 1 else None

    assert do(rows(3), tmp_path / "out.parquet", Answers(change)).tally.failed == 1


def test_a_job_that_stops_names_the_first_row_that_failed_and_keeps_those_before_it(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(50)))
    out = tmp_path / "out.jsonl"
    with pytest.raises(RowFailed, match="line 21: ValueError: no"):
        do(tmp_path / "in.jsonl", out, Answers(fails_on(20, 22)), stops=True)
    stage = Answers(fails_on())
    do(tmp_path / "in.jsonl", out, stage, stops=True, resume=True)
    assert stage.ran[0] == 20
    assert ids(out) == list(range(50))


def test_what_ends_the_job_keeps_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="the engine is gone"):
        do(rows(300), out, Breaks(at=150))
    stage = Answers()
    do(rows(300), out, stage, resume=True)
    assert stage.ran[0] == DONE
    assert ids(out) == list(range(300))


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"

    def interrupt(row: Row) -> None:
        if row.data["id"] == 30:
            os.kill(os.getpid(), signal.SIGINT)

    job = Job(rows(10_000), out, JobOptions(progress=False, flush_interval_s=FOREVER), {"model": "m"})
    with pytest.raises(KeyboardInterrupt):
        run(job, Flow([Answers(interrupt)]))
    assert job.kept == (len(ids(tmp_path / "out.jsonl.partial")), tmp_path / "out.jsonl.partial")
    stage = Answers()
    do(rows(10_000), out, stage, resume=True)
    assert stage.ran[0] == job.kept[0] > 30


def test_where_an_event_loop_runs_a_job_has_a_thread_which_ctrl_c_ends(tmp_path: Path) -> None:
    def interrupt(row: Row) -> None:
        if row.data["id"] == 500:  # when those of many windows are taken in
            os.kill(os.getpid(), signal.SIGINT)

    async def notebook(source: Iterable[dict[str, Any]]) -> Summary:
        return do(source, tmp_path / "out.jsonl", Answers(interrupt))

    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(notebook(rows(20))).tally.rows == 20
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(notebook({"id": i} for i in itertools.count()))
    loop.close()
    assert len(ids(tmp_path / "out.jsonl.partial")) > 400


def test_a_job_without_resume_starts_over(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError):
        do(rows(300), out, Breaks(at=150))
    kept = ids(tmp_path / "out.jsonl.partial")
    with pytest.raises(RuntimeError):
        do(rows(300), out, Breaks(at=0))
    assert ids(tmp_path / "out.jsonl.partial") == kept  # until there is something in its place
    stage = Answers()
    do(rows(300), out, stage)
    assert stage.ran == list(range(300))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def half_done(tmp_path: Path) -> Path:
    with pytest.raises(RuntimeError):
        do(rows(300), tmp_path / "out.jsonl", Breaks(at=150))
    return tmp_path / "out.jsonl"


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        (rows(300), {"fingerprint": {"model": "n"}}, "model='n': must be 'm', as when the job began"),
        (rows(300), {"errors": "failed.jsonl"}, "errors="),
        ([{"id": 1}, *rows(300)], {}, "input='rows 1 to 128': are not those of the job"),
        (rows(20), {}, "input='20 rows': must have the 128 rows that were answered"),
    ],
)
def test_what_changed_since_a_job_began_is_named(given: Any, changes: Any, message: str, tmp_path: Path) -> None:
    out, stage = half_done(tmp_path), Answers()
    if "errors" in changes:
        changes = {"errors": tmp_path / changes["errors"]}
    with pytest.raises(ConfigError, match=message):
        do(given, out, stage, resume=True, **changes)
    assert stage.opened == 0


def test_a_held_row_that_changed_is_found(tmp_path: Path) -> None:
    """One that was done ahead of its turn."""

    class Held(Answers):
        def _answer(self, rows: list[Row], done: Done) -> None:
            last = [row for row in rows if row.data["id"] == 7]
            super()._answer(last, done)
            if last:
                self.fail(RuntimeError("over"))

    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError):
        do(rows(20), out, Held())
    with pytest.raises(ConfigError, match="rows 1 to 8"):
        do([{"id": -1}, *rows(20)[1:]], out, resume=True)
    stage = Answers()
    do(rows(20), out, stage, resume=True)
    assert sorted(stage.ran) == [i for i in range(20) if i != 7]
    assert ids(out) == list(range(20))


def test_a_damaged_partial_output_is_not_continued(tmp_path: Path) -> None:
    out = half_done(tmp_path)
    os.truncate(tmp_path / "out.jsonl.partial", 3)
    with pytest.raises(ConfigError, match="has 3 bytes"):
        do(rows(300), out, resume=True)
    (tmp_path / "out.jsonl.ledger").write_text("{")
    with pytest.raises(ConfigError, match="is no ledger of a job"):
        do(rows(300), out, resume=True)


def test_a_job_that_is_complete_is_not_done_again(tmp_path: Path) -> None:
    out, stage = tmp_path / "out.jsonl", Answers(fails_on(3))
    assert do(rows(10), out, stage, resume=True).ran
    summary = do(rows(10), out, stage, resume=True)
    assert (summary.ran, summary.tally.rows, summary.tally.failed, stage.opened) == (False, 10, 1, 1)
    with pytest.raises(ConfigError, match="has more than the 10 rows of the job that is complete"):
        do(rows(11), out, resume=True)
    out.unlink()
    assert do(rows(10), out, stage, resume=True).ran


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet", "out.arrow"])
def test_rows_that_failed_run_again(name: str, tmp_path: Path) -> None:
    out, errors = tmp_path / name, tmp_path / "failed.jsonl"
    do(rows(50), out, Answers(fails_on(3, 40, 49)), errors=errors)
    stage = Answers(fails_on(40))
    summary = do(rows(50), out, stage, errors=errors, retry_failed=True)
    assert stage.ran == [3, 40, 49]
    assert (summary.tally.rows, summary.tally.failed) == (50, 1)
    assert ids(errors) == [40]
    stage = Answers(fails_on())
    assert do(rows(50), out, stage, errors=errors, retry_failed=True).tally.failed == 0
    assert stage.ran == [40]
    assert not do(rows(50), out, stage, errors=errors, retry_failed=True).ran


def test_a_retry_keeps_the_types_of_the_output(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    do(rows(5), tmp_path / "out.parquet", Answers(fails_on(3)))
    before = pq.read_schema(tmp_path / "out.parquet")
    do(rows(5), tmp_path / "out.parquet", Answers(fails_on()), retry_failed=True)
    assert pq.read_schema(tmp_path / "out.parquet") == before


def test_a_job_that_ended_early_is_finished_before_its_failed_rows_run_again(tmp_path: Path) -> None:
    stage = Breaks(at=150)
    stage.change = fails_on(3)
    with pytest.raises(RuntimeError):
        do(rows(300), tmp_path / "out.jsonl", stage)
    again = Answers(fails_on())
    do(rows(300), tmp_path / "out.jsonl", again, retry_failed=True)
    assert again.ran[-1] == 3
    assert again.opened == 1
    assert all(row.get("answer") == "yes" for row in records(tmp_path / "out.jsonl"))


def test_an_output_of_another_input_is_not_retried(tmp_path: Path) -> None:
    do(rows(10), tmp_path / "out.jsonl", Answers(fails_on(3)))
    with pytest.raises(ConfigError, match="has more rows than the input"):
        do(rows(5), tmp_path / "out.jsonl", retry_failed=True)


def test_rows_that_come_only_once_cannot_be_retried(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an input that can be read twice"):
        do(iter(rows(5)), tmp_path / "out.jsonl", retry_failed=True)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_memory_does_not_grow_with_the_input(kind: str, tmp_path: Path) -> None:
    """Peak resident megabytes of jobs of 100,000 and of 400,000 rows, each in a process of its own."""
    script = Path(__file__).with_name("peak_memory.py")
    peaks = [
        float(subprocess.check_output([sys.executable, script, str(count), tmp_path / f"{count}.{kind}"]))
        for count in (100_000, 400_000)
    ]
    assert peaks[1] < peaks[0] + 40, peaks


def test_a_full_disk_ends_the_job_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"/dev/full.*cannot be written: No space left"):
        do(rows(5), Path("/dev/full"))


def test_a_file_cannot_be_two_of_a_jobs_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="must be another file than the input"):
        do(tmp_path / "link", path)
    with pytest.raises(ConfigError, match="must be another file than the input and the output"):
        do(path, tmp_path / "b.jsonl", errors=tmp_path / "b.jsonl")


def test_what_is_held_takes_no_more_room_the_longer_a_job_runs(tmp_path: Path) -> None:
    """Every commit holds 100 rows, which the next one no longer does."""
    held = HeldRows(tmp_path / "out", JsonLines(), None)
    sizes: list[int] = []
    for turn in range(50):
        state = held.add({i: Answer(i, 0, {"id": i}) for i in range(100 * turn, 100 * (turn + 1))})
        held.sync()
        held.drop_stale()
        assert state
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        assert list(HeldRows(tmp_path / "out", JsonLines(), state).load())[-100:] == list(
            range(100 * turn, 100 * turn + 100)
        )
    assert max(sizes) < 10 * sizes[0]
    held.close()


def test_commits_are_durable_before_the_ledger_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power would leave: nothing is renamed, or counted, before what it stands for is on disk."""
    unsynced: set[Path] = set()
    append, sync, replace = AppendedFile.append, AppendedFile.sync, os.replace

    def watch_append(file: AppendedFile, content: bytes) -> None:
        unsynced.add(file.path)
        append(file, content)

    def watch_sync(file: AppendedFile) -> None:
        sync(file)
        unsynced.discard(file.path)

    def watch_replace(source: Path, target: Path) -> None:
        assert not unsynced
        replace(source, target)

    monkeypatch.setattr(AppendedFile, "append", watch_append)
    monkeypatch.setattr(AppendedFile, "sync", watch_sync)
    monkeypatch.setattr(os, "replace", watch_replace)
    do(rows(300), tmp_path / "out.jsonl", Answers(fails_on(5)), errors=tmp_path / "failed.jsonl")
    assert ids(tmp_path / "out.jsonl") == list(range(300))
