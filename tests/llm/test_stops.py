"""Stop strings, against the naive reading of what they mean."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from headway.llm.stops import StopStrings

few_letters = st.text(alphabet="ab\n", max_size=30)
stops = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    machine, shown = StopStrings(stops, include), ""
    for piece in pieces:
        text, stop = machine.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + machine.flush(), None


@given(st.lists(few_letters, max_size=8), stops, st.booleans())
def test_pieces_give_what_the_whole_text_gives(pieces: list[str], stops: list[str], include: bool) -> None:
    assert run(pieces, stops, include) == naive("".join(pieces), stops, include)


@given(st.lists(few_letters, max_size=8), stops)
def test_held_back_text_is_always_the_start_of_a_stop_string(pieces: list[str], stops: list[str]) -> None:
    machine, pushed, shown = StopStrings(stops), "", ""
    for piece in pieces:
        pushed += piece
        text, stop = machine.push(piece)
        if stop is not None:
            return
        shown += text
        held = pushed[len(shown) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    machine = StopStrings(["\n\nUser:"])
    assert machine.push("Hello.\n") == ("Hello.", None)
    assert machine.push("\nMore") == ("\n\nMore", None)
    assert machine.push("\n\nUser: hi") == ("", "\n\nUser:")


def test_text_that_is_held_back_is_not_searched_again() -> None:
    machine = StopStrings(["a" * 30_000 + "b", *(f"{'a' * i}b{'a' * i}" for i in range(20, 147))])
    began = time.perf_counter()
    assert {machine.push("aaaa") for _ in range(4000)} == {("", None)}
    assert time.perf_counter() - began < 2
