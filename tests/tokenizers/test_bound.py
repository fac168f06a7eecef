"""The fewest tokens a text can have is never more than it has."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from headway.tokenizers import Tokenizer
from headway.tokenizers.bound import _alphabet  # pyright: ignore[reportPrivateUsage]


def test_every_byte_has_its_spelling() -> None:
    assert sorted(_alphabet()) == sorted(ByteLevel.alphabet())
    for byte, spelling in enumerate(_alphabet()[:0x80]):
        assert ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0] == spelling


@given(st.text(), st.integers(1, 300))
def test_no_text_has_fewer(tokenizer: Tokenizer, text: str, times: int) -> None:
    assert tokenizer.fewest_tokens(text * times) <= len(tokenizer.encode(text * times))


def test_a_long_text_has_many(tokenizer: Tokenizer) -> None:
    assert tokenizer.fewest_tokens("word " * 2_000_000) > 30_000
    assert tokenizer.fewest_tokens("\U00050000\x16" * 1_000_000) < len(tokenizer.encode("a" * 200_000))


def test_nothing_is_certain_where_a_word_may_be_one_unknown(minilm_tokenizer: Tokenizer) -> None:
    assert minilm_tokenizer.fewest_tokens("a" * 100_000) == 0
    assert len(minilm_tokenizer.encode("a" * 100_000)) == 3
