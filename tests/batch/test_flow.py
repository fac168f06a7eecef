"""Rows through stages: each goes on alone, and what is wrong with one is its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.batch.flow import Fail, Flow, Stage
from headway.batch.row import Done, Row
from headway.batch.stages.functions import Inline, Threaded, each, postprocess, preprocess


def rows(count: int) -> list[Row]:
    return [Row.of(i, {"x": i}) for i in range(count)]


def answer(stages: Sequence[Stage], given: list[Row]) -> list[dict[str, Any]]:
    async def run() -> None:
        async with Flow(stages) as flow:
            await asyncio.wait_for(flow.answer(given), 30)

    asyncio.run(run())
    return [row.record() for row in given]


class Held:
    """Keeps rows until it is told which to let go."""

    name = "held"
    window = 4

    def __init__(self) -> None:
        self.inside: list[tuple[Row, Done]] = []

    async def open(self, fail: Fail) -> None:
        self.fail = fail

    def submit(self, rows: list[Row], done: Done) -> None:
        self.inside += [(row, done) for row in rows]

    async def close(self) -> None:
        self.inside.clear()

    def release(self, place: int) -> None:
        row, done = self.inside.pop(place)
        done([row])


def test_a_row_that_fails_is_its_columns_and_the_error_and_passes_the_other_stages_by() -> None:
    def odd(row: dict[str, Any]) -> dict[str, Any]:
        if row["x"] % 2:
            raise ValueError(f"{row['x']} is odd")
        return {"half": row["x"] // 2}

    seen: list[int] = []
    look = Inline("look", lambda: each("look", lambda row: seen.append(row.index)))
    found = answer([Inline("preprocess", lambda: preprocess(odd)), look], rows(4))
    error = {"type": "ValueError", "message": "1 is odd", "stage": "preprocess"}
    assert found[:2] == [{"x": 0, "half": 0}, {"x": 1, "error": error}]
    assert seen == [0, 2]


def test_postprocess_makes_the_output_row() -> None:
    found = answer([Inline("postprocess", lambda: postprocess(lambda row: {"y": row["x"] + 1}))], rows(2))
    assert found == [{"y": 1}, {"y": 2}]


@pytest.mark.parametrize("wrap", [preprocess, postprocess])
def test_a_function_that_returns_no_dict_fails_the_row(wrap: Any) -> None:
    def wrong(row: dict[str, Any]) -> Any:
        return [row]

    (found,) = answer([Inline("function", lambda: wrap(wrong))], rows(1))
    assert found["error"]["type"] == "RequestError" and "must return a dict" in found["error"]["message"]


@given(sizes=st.lists(st.integers(1, 7), max_size=12), batch=st.integers(1, 5), workers=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_threads_get_batches_of_the_size_asked_for_and_every_row_once(
    sizes: list[int], batch: int, workers: int
) -> None:
    batches: list[list[int]] = []
    busy, most, lock = 0, 0, threading.Lock()

    def run(some: list[Row]) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
            batches.append([row.index for row in some])
        with lock:
            busy -= 1

    async def go() -> list[int]:
        done: list[int] = []
        async with Flow([Threaded("work", lambda: run, batch, workers)]) as flow:
            start, pushes = 0, list[Any]()
            for size in sizes:
                some = [Row.of(i, {}) for i in range(start, start + size)]
                pushes.append(flow.answer(some))
                done += range(start, start + size)
                start += size
            await asyncio.wait_for(asyncio.gather(*pushes), 30)
        return done

    everything = asyncio.run(go())
    assert sorted(i for some in batches for i in some) == everything
    assert all(len(some) <= batch for some in batches) and most <= workers


def test_a_row_is_done_while_those_it_came_with_are_not() -> None:
    async def run() -> None:
        held, done = Held(), list[int]()
        async with Flow([held, Inline("mark", lambda: each("mark", lambda row: row.data.update(y=1)))]) as flow:
            flow.push(rows(3), lambda some: done.extend(row.index for row in some))
            held.release(1)
            assert done == [1]
            held.release(1)
            held.release(0)
            assert done == [1, 2, 0]

    asyncio.run(run())


def test_rows_of_a_caller_may_leave_a_stage_together_whatever_they_came_with() -> None:
    async def run() -> None:
        held, first, second = Held(), list[Row](), list[Row]()
        async with Flow([held]) as flow:
            for done in (first.extend, first.extend, second.extend):
                flow.push(rows(1), done)
            ways = [way for _, way in held.inside]
            assert ways[0] == ways[1] != ways[2]
            ways[0]([row for row, _ in held.inside[:2]])
            ways[2]([held.inside[2][0]])
        assert (len(first), len(second)) == (2, 1)

    asyncio.run(run())


def test_what_ends_the_job_reaches_whoever_waits() -> None:
    async def run() -> None:
        held = Held()
        async with Flow([held]) as flow:
            waiting = asyncio.create_task(flow.answer(rows(2)))
            await asyncio.sleep(0)
            held.fail(RuntimeError("no more"))
            with pytest.raises(RuntimeError, match="no more"):
                await asyncio.wait_for(waiting, 30)

    asyncio.run(run())


def test_stages_that_opened_are_closed_when_another_one_cannot() -> None:
    closed: list[str] = []

    class Tells(Held):
        async def close(self) -> None:
            closed.append(self.name)

    def refuse() -> Any:
        raise OSError("cannot")

    async def run() -> None:
        with pytest.raises(OSError, match="cannot"):
            async with Flow([Tells(), Inline("bad", refuse)]):
                pass

    asyncio.run(run())
    assert closed == ["held"]
