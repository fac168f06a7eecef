"""From engine outputs to text, as they would come from any engine."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.llm.outputs import GeneratedResult
from headway.llm.processor import Prepared
from headway.messages import EngineOutput, Request, RequestOutput, RowLogprobs, SamplingParams
from headway.tokenizers import Tokenizer

PROMPT = "Say something:"
EOS = 2


def result(tokenizer: Tokenizer, params: SamplingParams, *, delta: bool = False) -> GeneratedResult:
    requests = [
        Request(
            request_id=f"r/{i}",
            prompt_token_ids=tokenizer.encode(PROMPT),
            sampling=params,
            stop_token_ids=[EOS],
            stream=delta or bool(params.stop),
        )
        for i in range(params.n)
    ]
    prepared = Prepared(request_id="r", prompt=PROMPT, params=params, requests=requests, delta=delta)
    return GeneratedResult(tokenizer, prepared)


def feed(
    made: GeneratedResult,
    ids: list[int],
    reason: str | None = "length",
    *,
    cuts: list[int] | None = None,
    index: int = 0,
) -> tuple[list[RequestOutput], bool]:
    """Feeds ids cut into pieces, as an engine would until told to abort."""
    outputs: list[RequestOutput] = []
    edges = [0, *sorted({c for c in cuts or [] if 0 < c < len(ids)}), len(ids)]
    for start, end in pairwise(edges):
        last = end == len(ids)
        piece = EngineOutput(request_id=f"r/{index}", token_ids=ids[start:end], finish_reason=reason if last else None)  # type: ignore[arg-type]
        output, must_abort = made.feed(piece)
        outputs += [output] if output is not None else []
        if must_abort:
            return outputs, True
    return outputs, False


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), cuts=st.lists(st.integers(1, 60)))
def test_deltas_join_to_the_whole(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = [*tokenizer.encode(text), EOS]
    (whole,), _ = feed(result(tokenizer, SamplingParams()), ids, "stop")
    deltas, _ = feed(result(tokenizer, SamplingParams(), delta=True), ids, "stop", cuts=cuts)
    # Not compared to the text itself: the vocabulary lacks the bytes of a few characters.
    assert whole.outputs[0].text == tokenizer.decode(ids) == "".join(d.outputs[0].text for d in deltas)
    assert [t for d in deltas for t in d.outputs[0].token_ids] == ids
    assert [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]


@settings(max_examples=100, deadline=None)
@given(
    text=st.text("abc ", max_size=30),
    stops=st.lists(st.text("abc ", min_size=1, max_size=3), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 30)),
    delta=st.booleans(),
)
def test_a_stop_string_ends_text_and_request(
    tokenizer: Tokenizer, text: str, stops: list[str], cuts: list[int], delta: bool
) -> None:
    ids = tokenizer.encode(text) or [EOS]
    outputs, aborted = feed(result(tokenizer, SamplingParams(stop=stops), delta=delta), ids, cuts=cuts)
    shown = "".join(o.outputs[0].text for o in outputs)
    last = outputs[-1].outputs[0]
    hits = [(text.find(s) + len(s), -len(s), s) for s in stops if s in text]
    if hits:
        end, length, stop = min(hits)
        assert (shown, last.finish_reason, last.stop_reason) == (text[: end + length], "stop", stop)
    else:
        assert (shown, last.finish_reason, last.stop_reason, aborted) == (text, "length", None, False)
    assert outputs[-1].finished


def test_tokens_and_logprobs_after_a_stop_string_are_dropped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two three four")
    rows = [RowLogprobs(token_ids=[t], logprobs=[-1.0], rank=1) for t in ids]
    made = result(tokenizer, SamplingParams(stop=" two"))
    output, must_abort = made.feed(EngineOutput(request_id="r/0", token_ids=ids, logprobs=rows))
    assert output is not None and must_abort
    completion = output.outputs[0]
    assert completion.text == "one"
    assert completion.token_ids == ids[:2]
    assert completion.logprobs is not None and len(completion.logprobs) == 2
    late = EngineOutput(request_id="r/0", finish_reason="abort")
    assert made.feed(late) == (None, False)


def test_the_stop_string_can_be_kept(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop="two", include_stop_str_in_output=True)
    (output,), _ = feed(result(tokenizer, params), tokenizer.encode("one two three"))
    assert output.outputs[0].text == "one two"


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two one two")
    (output,), _ = feed(result(tokenizer, SamplingParams(stop="two", min_tokens=2)), ids)
    assert output.outputs[0].text == "one two one "
    assert len(ids) == 4


def test_the_token_that_stopped_is_shown_only_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("done"), EOS]
    shown = SamplingParams(skip_special_tokens=False)
    kept = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    for params, text in ((shown, "done"), (kept, "done<|im_end|>")):
        for delta in (False, True):
            outputs, _ = feed(result(tokenizer, params, delta=delta), ids, "stop")
            assert outputs[-1].outputs[0].text == text
            assert outputs[-1].outputs[0].token_ids == ids


def test_samples_join_in_order_when_the_last_one_ends(tokenizer: Tokenizer) -> None:
    made = result(tokenizer, SamplingParams(n=2))
    assert feed(made, tokenizer.encode("second"), index=1) == ([], False)
    ((output,), _) = feed(made, tokenizer.encode("first"), index=0)
    assert [(c.index, c.text) for c in output.outputs] == [(0, "first"), (1, "second")]
    assert output.finished
    assert output.usage["completion_tokens"] == sum(len(c.token_ids) for c in output.outputs)


def test_logprobs_carry_tokens_as_they_read_in_the_text(tokenizer: Tokenizer) -> None:
    (paris,), (the,) = tokenizer.encode(" Paris"), tokenizer.encode(" the")
    row = RowLogprobs(token_ids=[paris, the, paris], logprobs=[-1.5, -0.5, -1.5], rank=2)
    made = result(tokenizer, SamplingParams(logprobs=2, prompt_logprobs=1))
    output, _ = made.feed(
        EngineOutput(
            request_id="r/0", token_ids=[paris], logprobs=[row], prompt_logprobs=[row, row], finish_reason="length"
        )
    )
    assert output is not None
    (logprobs,) = output.outputs[0].logprobs or []
    found = [(t, entry.rank, entry.logprob, entry.decoded_token) for t, entry in logprobs.items()]
    assert found == [(paris, 2, -1.5, " Paris"), (the, 1, -0.5, " the")]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == 3


@pytest.mark.parametrize("delta", [True, False])
def test_samples_share_what_is_known_of_their_prompt(tokenizer: Tokenizer, delta: bool) -> None:
    made = result(tokenizer, SamplingParams(n=2, prompt_logprobs=0), delta=delta)
    row = RowLogprobs(token_ids=[5], logprobs=[-1.5], rank=2)
    told = [
        made.feed(EngineOutput(request_id=f"r/{i}", token_ids=[5], prompt_logprobs=[row], finish_reason="length"))[0]
        for i in range(2)
    ]
    known = [output.prompt_logprobs for output in told if output is not None]
    assert len(known) == (2 if delta else 1)
    assert all(one is known[0] and one is not None and len(one) == 2 for one in known)
