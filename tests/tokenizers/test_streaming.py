"""Detokenising step by step gives the text that detokenising at once gives."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from headway.tokenizers import Tokenizer
from headway.tokenizers.tokenizer import TokenizerInfo


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Words with a leading space of their own, and bytes for the rest."""
    tokens = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁Paris", "▁is", "▁The", "s", "."]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return Tokenizer(backend, TokenizerInfo())


def streamed(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> str:
    stream = tokenizer.stream(prompt)
    return "".join([*(stream.push(t) for t in ids), stream.flush()])


@settings(max_examples=150, deadline=None)
@given(prompt=st.text(max_size=20), text=st.text(max_size=60))
def test_streamed_text_equals_the_whole(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    before, ids = tokenizer.encode(prompt), tokenizer.encode(text)
    assert streamed(tokenizer, before, ids) == tokenizer.decode_after(before, ids) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(prompt=st.lists(st.integers(0, 49151), max_size=8), ids=st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_stream_to_the_whole_text(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    assert streamed(tokenizer, prompt, ids) == tokenizer.decode(ids)


def test_every_token_streams_to_its_text(tokenizer: Tokenizer) -> None:
    for token in range(tokenizer.vocab_size + 1):  # the last one is none: a model's vocabulary may be larger
        stream = tokenizer.stream(skip_special_tokens=False)
        assert stream.push(token) + stream.flush() == tokenizer.decode([token], False)


def test_a_character_of_several_tokens_arrives_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🤗")
    stream = tokenizer.stream()
    assert len(ids) > 1
    assert [stream.push(t) for t in ids] == [""] * (len(ids) - 1) + ["🤗"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_flushed_as_a_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🤗")[:-1]
    assert streamed(tokenizer, [], ids) == tokenizer.decode(ids) == "\ufffd"


def test_special_tokens_are_shown_only_when_asked_for(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream(skip_special_tokens=False)
    assert stream.push(2) == "<|im_end|>"
    assert tokenizer.stream().push(2) == ""


def test_the_leading_space_depends_on_the_prompt(sentencepiece: Tokenizer) -> None:
    the, paris = (sentencepiece.backend.token_to_id(t) for t in ("▁The", "▁Paris"))
    assert streamed(sentencepiece, [the], [paris]) == sentencepiece.decode_after([the], [paris]) == " Paris"
    assert streamed(sentencepiece, [], [paris]) == sentencepiece.decode_after([], [paris]) == "Paris"


def test_bytes_that_are_no_character_do_not_stop_the_stream(sentencepiece: Tokenizer) -> None:
    def byte(b: int) -> int:
        return sentencepiece.backend.token_to_id(f"<0x{b:02X}>")

    word = sentencepiece.backend.token_to_id("▁is")
    text = streamed(sentencepiece, [], [byte(0xC3), byte(0xA9), byte(0xFF), word])
    assert text.startswith("é") and text.endswith(" is")


def test_broken_bytes_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    lone = tokenizer.backend.token_to_id("ĺ")  # a continuation byte
    stream = tokenizer.stream()
    pieces = [stream.push(lone) for _ in range(100)]
    assert sum(len(p) for p in pieces) > 80


def test_pieces_keep_their_leading_space(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert tokenizer.token_to_piece(tokenizer.encode(" Paris")[0]) == " Paris"
    assert sentencepiece.token_to_piece(sentencepiece.backend.token_to_id("▁Paris")) == " Paris"
    assert sentencepiece.token_to_piece(sentencepiece.backend.token_to_id("s")) == "s"
