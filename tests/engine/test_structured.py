"""Structured output: what a constraint allows next, and what happens to bad ones."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.engine.structured import LLGuidanceBackend, LLGuidanceMatcher
from headway.errors import ModelError, RequestError
from headway.messages import StructuredOutput
from headway.tokenizers import Tokenizer

VOCAB = 49160  # a few rows more than the tokenizer knows, as padded heads have
EOS = (2, 0)


@pytest.fixture(scope="module")
def backend(tokenizer: Tokenizer) -> LLGuidanceBackend:
    return LLGuidanceBackend(tokenizer.backend.to_str, VOCAB, EOS)


def allowed(matcher: LLGuidanceMatcher) -> set[int]:
    mask = matcher.mask()
    assert len(mask) == -(-VOCAB // 32) * 4
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=VOCAB, bitorder="little")
    return set(bits.nonzero()[0].tolist())


def accepts(backend: LLGuidanceBackend, tokenizer: Tokenizer, constraint: StructuredOutput, text: str) -> bool:
    """Whether the text can be generated whole, every token allowed when its turn comes."""
    matcher = backend.compile(constraint)
    for token in tokenizer.encode(text):
        if token not in allowed(matcher):
            return False
        assert matcher.accept(token)
    return EOS[0] in allowed(matcher)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("constraint", "text", "whole"),
    [
        (StructuredOutput(json=PERSON), '{"name": "Ada 漢字", "age": 36}', True),
        (StructuredOutput(json=json.dumps(PERSON)), '{"name":"Ada","age":36}', True),
        (StructuredOutput(json=PERSON), '{"name": "Ada", "age": -1}', False),
        (StructuredOutput(json=PERSON), '{"name": "Ada"}', False),
        (StructuredOutput(json={}), '{"any": [1, {"x": null}]}', True),
        (StructuredOutput(json="{}"), "[1]", False),
        (StructuredOutput(regex=r"\d{3}-[a-c]+"), "123-abc", True),
        (StructuredOutput(regex=r"\d{3}-[a-c]+"), "12-abc", False),
        (StructuredOutput(choice=["yes", 'the "quoted"\n one', "no"]), 'the "quoted"\n one', True),
        (StructuredOutput(choice=["yes", "no"]), "maybe", False),
        (StructuredOutput(grammar='start: "a" start "b" | "c"'), "aacbb", True),
        (StructuredOutput(grammar='start: "a" start "b" | "c"'), "aacb", False),
    ],
)
def test_a_text_is_possible_exactly_if_it_satisfies_the_constraint(
    backend: LLGuidanceBackend, tokenizer: Tokenizer, constraint: StructuredOutput, text: str, whole: bool
) -> None:
    assert accepts(backend, tokenizer, constraint, text) is whole


def test_end_of_sequence_is_allowed_exactly_when_complete(backend: LLGuidanceBackend, tokenizer: Tokenizer) -> None:
    matcher = backend.compile(StructuredOutput(regex="ab?"))
    assert not allowed(matcher) & set(EOS)
    assert not matcher.accept(EOS[0])
    (a,) = tokenizer.encode("a")
    assert matcher.accept(a)
    assert set(EOS) < allowed(matcher)
    (b,) = tokenizer.encode("b")
    assert matcher.accept(b)
    assert allowed(matcher) == set(EOS)
    assert matcher.accept(EOS[1])
    assert not matcher.accept(b)


def test_special_and_padding_tokens_are_never_part_of_the_text(backend: LLGuidanceBackend) -> None:
    ids = allowed(backend.compile(StructuredOutput(regex="(.|\n)*")))
    assert 1 not in ids
    assert max(ids) < 49152


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=40))
def test_following_the_mask_never_leaves_the_grammar(backend: LLGuidanceBackend, draws: list[int]) -> None:
    matcher = backend.compile(StructuredOutput(json=PERSON))
    for draw in draws:
        choices = sorted(allowed(matcher))
        token = choices[draw % len(choices)]
        assert matcher.accept(token)
        if token in EOS:
            break


def test_requests_with_the_same_constraint_do_not_share_state(backend: LLGuidanceBackend, tokenizer: Tokenizer) -> None:
    one, two = (backend.compile(StructuredOutput(choice=["yes", "no"])) for _ in range(2))
    before = two.mask()
    assert one.accept(tokenizer.encode("yes")[0])
    assert two.mask() == before != one.mask()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("json", {"type": "wat"}),
        ("json", "{not json"),
        ("json", "[1]"),
        ("json", {"type": "object", "not": {}}),
        ("json", {"$ref": "#/nowhere"}),
        ("regex", "(unclosed"),
        ("choice", []),
        ("choice", ["fine", ""]),
        ("grammar", "start: nothing_defined"),
        ("grammar", "no rules at all"),
        ("regex", "x" * 600_000),
    ],
)
def test_a_bad_constraint_is_a_request_error_naming_the_field(
    backend: LLGuidanceBackend, field: str, value: Any
) -> None:
    with pytest.raises(RequestError, match=rf"structured\.{field}="):
        backend.compile(StructuredOutput(**{field: value}))


@pytest.mark.parametrize(
    "constraint",
    [
        StructuredOutput(regex="((((a{1,1000}){1,1000}){1,1000}){1,1000})+b"),
        StructuredOutput(regex="(.*a.{500}){3}"),
        StructuredOutput(choice=["x" * 1000 + str(i) for i in range(400)]),
        StructuredOutput(json={"enum": [f"value {i}" for i in range(20_000)]}),
    ],
    ids=["nested", "exponential", "many choices", "large enum"],
)
def test_a_costly_constraint_is_bounded_in_time(
    backend: LLGuidanceBackend, tokenizer: Tokenizer, constraint: StructuredOutput
) -> None:
    start = time.perf_counter()
    try:
        matcher = backend.compile(constraint)
        for token in tokenizer.encode("aaaaaaaaaaaaaaa"):
            matcher.mask()
            if not matcher.accept(token):
                break
    except RequestError as error:
        assert error.field.startswith("structured.")
    assert time.perf_counter() - start < 3.0


def test_a_compiled_constraint_is_remembered(tokenizer: Tokenizer) -> None:
    calls: list[int] = []

    def tokenizer_json() -> str:
        calls.append(1)
        return tokenizer.backend.to_str()

    backend = LLGuidanceBackend(tokenizer_json, VOCAB, EOS)
    assert not calls
    for i in range(100):
        backend.compile(StructuredOutput(regex=f"{i}a+"))
    assert len(calls) == 1


def test_a_tokenizer_that_cannot_be_constrained_is_a_model_error(tokenizer: Tokenizer) -> None:
    backend = LLGuidanceBackend(tokenizer.backend.to_str, 256, EOS)  # fewer rows than tokens
    with pytest.raises(ModelError, match="cannot constrain this model's tokenizer"):
        backend.compile(StructuredOutput(regex="a"))


def test_a_dead_end_allows_only_an_end_that_is_not_accepted(backend: LLGuidanceBackend, tokenizer: Tokenizer) -> None:
    # Every "a" may be the one that counts: the states of the automaton double with each.
    matcher = backend.compile(StructuredOutput(regex="(.*a.{400}){3}"))
    (a,) = tokenizer.encode("a")
    for _ in range(200):
        matcher.mask()
        if not matcher.accept(a):
            break
    assert allowed(matcher) == set(EOS)
    assert not matcher.accept(a)
    assert not matcher.accept(EOS[0])


def test_an_ambiguous_grammar_is_bounded_in_time(backend: LLGuidanceBackend, tokenizer: Tokenizer) -> None:
    matcher = backend.compile(StructuredOutput(grammar='start: s\ns: s s | "a" | "a" "a" s'))
    (a,) = tokenizer.encode("a")
    start = time.perf_counter()
    steps = next(i for i in range(10_000) if not (matcher.mask() and matcher.accept(a)))
    assert (time.perf_counter() - start) / steps < 0.05
