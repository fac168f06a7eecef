"""Loading a tokenizer from a Hugging Face directory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from headway.errors import ModelError, RequestError
from headway.tokenizers import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def minilm_reference(minilm_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_dir)


def byte_level_files(path: Path, *, tokenizer_json: bool = True, **config: Any) -> Path:
    """A tiny GPT-2-like checkpoint directory."""
    words = ["</s>", "<s>", "Ġhi", "hi", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {t: i for i, t in enumerate(words)}
    merges = [("h", "i"), ("Ġ", "hi")]
    path.mkdir(exist_ok=True)
    if tokenizer_json:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["</s>", "<s>"])
        backend.save(str(path / "tokenizer.json"))
    else:
        (path / "vocab.json").write_text(json.dumps(vocab))
        (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("text", ["Hello, World!", "naïve 漢字 🤗", "unaffable " * 300, ""])
def test_word_piece_encodes_as_transformers_does(minilm_tokenizer: Tokenizer, minilm_reference: Any, text: str) -> None:
    # The file asks for truncation to 128 tokens and padding; the engine decides about lengths, not the tokenizer.
    assert minilm_tokenizer.encode(text) == minilm_reference(text, truncation=False, padding=False)["input_ids"]


def test_pairs_carry_token_type_ids(minilm_tokenizer: Tokenizer, minilm_reference: Any) -> None:
    expected = minilm_reference("what is it", "a cat", truncation=False, padding=False)
    assert minilm_tokenizer.encode_pair("what is it", "a cat") == (expected["input_ids"], expected["token_type_ids"])


def test_batches_encode_as_single_texts_do(minilm_tokenizer: Tokenizer) -> None:
    texts = ["one", "two words", "", "Ünïcödé"]
    assert minilm_tokenizer.encode_batch(texts) == [minilm_tokenizer.encode(t) for t in texts]


@pytest.mark.parametrize("tokenizer_json", [True, False])
@pytest.mark.parametrize(("config", "expected"), [({}, [3]), ({"add_bos_token": True}, [1, 3])])
def test_add_bos_token_is_followed(
    tmp_path: Path, tokenizer_json: bool, config: dict[str, bool], expected: list[int]
) -> None:
    tokenizer = load_tokenizer(byte_level_files(tmp_path, tokenizer_json=tokenizer_json, **config))
    assert tokenizer.encode("hi") == expected
    assert tokenizer.encode("hi", add_special_tokens=False) == [3]
    assert tokenizer.decode([*expected, 0]) == "hi"


def test_eos_ids_join_the_tokenizers_and_the_generation_configs(tmp_path: Path) -> None:
    path = byte_level_files(tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, 8]}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_token_ids == (0, 7, 8)
    assert tokenizer.bos_token_id == 1


def test_eos_ids_fall_back_to_the_model_config(tmp_path: Path) -> None:
    path = byte_level_files(tmp_path)
    (path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert load_tokenizer(path).eos_token_ids == (0, 5)


def test_a_template_file_goes_before_the_config(tmp_path: Path) -> None:
    path = byte_level_files(tmp_path, chat_template="from config")
    assert load_tokenizer(path).chat_templates == {"default": "from config"}
    (path / "chat_template.jinja").write_text("from file")
    assert load_tokenizer(path).chat_templates == {"default": "from file"}


def test_named_templates_are_kept_apart(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    path = byte_level_files(tmp_path, chat_template=named)
    assert load_tokenizer(path).chat_templates == {"default": "d", "tool_use": "t"}


def test_a_directory_without_tokenizer_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer \(expected tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_is_a_model_error_naming_it(tmp_path: Path, name: str) -> None:
    path = byte_level_files(tmp_path)
    (path / name).write_text('{"truncated": ')
    with pytest.raises(ModelError, match=name):
        load_tokenizer(path)


def test_other_formats_are_converted_by_transformers(
    tmp_path: Path, minilm_dir: Path, minilm_tokenizer: Tokenizer
) -> None:
    for name in ("vocab.txt", "tokenizer_config.json", "config.json"):
        shutil.copy(minilm_dir / name, tmp_path)
    assert load_tokenizer(tmp_path).encode("Hello, wörld") == minilm_tokenizer.encode("Hello, wörld")


def test_text_that_is_not_unicode_is_a_request_error(minilm_tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"prompt=.*valid Unicode"):
        minilm_tokenizer.encode("lone \ud800 surrogate")


def test_threads_share_a_tokenizer(minilm_tokenizer: Tokenizer) -> None:
    texts = [f"text number {i} of many" for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(minilm_tokenizer.encode, texts)) == [minilm_tokenizer.encode(t) for t in texts]


def test_loading_imports_neither_torch_nor_transformers(minilm_dir: Path) -> None:
    code = (
        "import sys; from headway.tokenizers import load_tokenizer; load_tokenizer(sys.argv[1]);"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(minilm_dir)], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
