"""What answers are made of."""

from __future__ import annotations

import json

from headway.errors import MissingDependencyError
from headway.messages import Completion, Logprob
from headway.server.answers import TEXT, Chunks, Usage, chat_logprobs, text_logprobs
from headway.server.errors import api_error
from headway.server.protocol import StreamOptions


def row(*tokens: tuple[int, int, str]) -> dict[int, Logprob]:
    return {token: Logprob(logprob=-float(rank), rank=rank, decoded_token=text) for token, rank, text in tokens}


def test_the_most_likely_tokens_are_told_of_in_their_order() -> None:
    known = [row((5, 3, "c"), (1, 1, "a"), (2, 2, "b")), row((2, 2, "b"), (1, 1, "a")), row((9, 1, "\ufffd"))]
    content = chat_logprobs(Completion(index=0, text="", token_ids=[5, 2, 9], logprobs=known), 2)
    assert content is not None
    said = [(one["token"], [top["token"] for top in one["top_logprobs"]]) for one in content["content"]]
    assert said == [("c", ["a", "b"]), ("b", ["a", "b"]), ("\ufffd", ["\ufffd"])]
    assert [one["bytes"] for one in content["content"]] == [[99], [98], None]


def test_text_offsets_go_on_from_where_they_are() -> None:
    known = [None, row((2, 1, " bc"), (3, 2, "x")), row((3, 1, "d"))]
    assert text_logprobs([1, 2, 3], known, 10, "a") == {
        "tokens": ["a", " bc", "d"],
        "token_logprobs": [None, -1.0, -1.0],
        "top_logprobs": [None, {" bc": -1.0, "x": -2.0}, {"d": -1.0}],
        "text_offset": [10, 11, 14],
    }


def test_text_fits_between_the_two_halves_of_an_event() -> None:
    chunks = Chunks({"id": "c"}, StreamOptions(include_usage=True), Usage(prompt=3))
    before, after = chunks.around({"index": 1, "delta": {"content": TEXT}})
    event = before + json.dumps('say "hi"\n').encode() + after
    assert event == chunks.event({"index": 1, "delta": {"content": 'say "hi"\n'}})
    assert json.loads(event.removeprefix(b"data: "))["usage"] is None
    last, done = chunks.end().split(b"\n\n")[:2]
    assert json.loads(last.removeprefix(b"data: "))["usage"]["total_tokens"] == 3
    assert done == b"data: [DONE]"


def test_what_is_not_installed_is_told() -> None:
    told = api_error(MissingDependencyError("structured output needs llguidance"))
    assert (told.status, str(told)) == (400, "structured output needs llguidance")
