"""The tokenizer of a GGUF file is the original model's."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ModelError
from headway.gguf import GGUFFile
from headway.tokenizers import Tokenizer, load_tokenizer

TEXTS = [
    "The capital of France is Paris.",
    "  leading and trailing  ",
    "def f(x):\n\treturn x ** 2  # square\n\n\n    y = f(3)",
    "naïve café — “quotes” … ∑√∞",
    "漢字かな交じり文 한국어 العربية हिन्दी ไทย",
    "emoji 🤗👩‍👩‍👧‍👦🇫🇷 and \u200bzero width",
    "1 12 123 1234567890 3.14159 1,000,000 v2.0b1 0x1F",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "don't I'LL we've it's you're",
    "\r\n\r\n\t\t \n mixed\u00a0spaces\u3000here",
    "e\u0301 (combining) vs é",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_as_transformers_conversion_does(tokenizer: Tokenizer, transformers_tokenizer: Any, text: str) -> None:
    assert tokenizer.encode(text) == transformers_tokenizer.encode(text)


@pytest.mark.parametrize("text", TEXTS)
def test_decodes_what_it_encoded(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Nd", "Nl", "No"]), max_size=60))
def test_encodes_any_text_without_digits_as_transformers_does(
    tokenizer: Tokenizer, transformers_tokenizer: Any, text: str
) -> None:
    assert tokenizer.encode(text) == transformers_tokenizer.encode(text)


def test_splits_digits_from_spaces_as_the_original_does(tokenizer: Tokenizer) -> None:
    # transformers' conversion drops the original's digit splitting, so spaces before a number would break up.
    assert [tokenizer.token_to_piece(t) for t in tokenizer.encode("x  12")] == ["x", "  ", "1", "2"]
    assert tokenizer.encode("x ½") == [*tokenizer.encode("x"), *tokenizer.encode(" "), *tokenizer.encode("½")]


def test_special_tokens_and_template_come_from_the_metadata(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.special_tokens["eos_token"] == "<|im_end|>"
    assert tokenizer.encode("hi", add_special_tokens=True) == tokenizer.encode("hi", add_special_tokens=False)
    assert "<|im_start|>" in tokenizer.chat_templates["default"]
    assert tokenizer.decode([1, 72, 2]) == tokenizer.decode([72])


def write_gguf(path: Path, values: dict[str, Any]) -> Path:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for key, value in values.items():
        add = {
            str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array
        }[type(value)]  # fmt: skip
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def sentencepiece_values() -> dict[str, Any]:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["▁", "he", "ll", "hell", "hello", "▁hello", "▁w", "or", "ld", "▁wor", "▁world"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters, "<tool>"]
    plain = len(words) + len(letters)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(plain)] + [0.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * plain + [4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


SPM_TEXTS = ["hello world", " hello", "hello  world", "héllo 漢字 🤗", "</s>hello", "a<tool>b", "\n\thello\n", ""]


@pytest.mark.parametrize("text", SPM_TEXTS)
def test_sentencepiece_with_byte_fallback_encodes_as_transformers_does(tmp_path: Path, text: str) -> None:
    from transformers import AutoTokenizer

    path = write_gguf(tmp_path / "spm.gguf", sentencepiece_values())
    expected = AutoTokenizer.from_pretrained(tmp_path, gguf_file="spm.gguf")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode(text) == expected.encode(text)
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert tokenizer.decode(ids) == expected.decode(ids, skip_special_tokens=True)


def test_add_bos_of_the_file_is_followed(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "spm.gguf", {**sentencepiece_values(), "tokenizer.ggml.add_bos_token": False})
    assert load_tokenizer(path).encode("hello")[0] != 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "wordle"}, "wordle"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "martian"}, "martian"),
    ],
)
def test_an_unknown_kind_is_a_model_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "odd.gguf", {**sentencepiece_values(), **change})
    with pytest.raises(ModelError, match=message):
        load_tokenizer(path)


def test_a_file_without_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.ggml\.model"):
        load_tokenizer(write_gguf(tmp_path / "bare.gguf", {"general.name": "bare"}))


@pytest.mark.parametrize("keep", [0, 3, 10, 30, 200, 5000])
def test_a_truncated_file_is_a_model_error(tmp_path: Path, smollm2_gguf: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(smollm2_gguf.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load_tokenizer(path)


def test_an_absurd_length_is_a_model_error(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gguf"
    path.write_bytes(
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, 1 << 60)
    )
    with pytest.raises(ModelError, match="truncated"):
        load_tokenizer(path)


def test_metadata_equals_the_gguf_librarys(tmp_path: Path) -> None:
    from gguf import GGUFReader

    values = {**sentencepiece_values(), "a.bool": True, "a.text": "naïve 🤗"}
    path = write_gguf(tmp_path / "all.gguf", values)
    fields = {k: f.contents() for k, f in GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    assert GGUFFile(path).whole_metadata() == fields
