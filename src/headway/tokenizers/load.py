"""Finds the tokenizer of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from headway.errors import ModelError
from headway.tokenizers.absent import NoTokenizer
from headway.tokenizers.gguf import load_gguf_tokenizer
from headway.tokenizers.special import add_bos_and_eos
from headway.tokenizers.tokenizer import Tokenizer, TokenizerInfo

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Only transformers knows what to make of these.
_CONVERTIBLE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(path: str | Path, *, may_lack: bool = False) -> Tokenizer:
    """From a Hugging Face directory or a .gguf file. ModelError if there is none that can be used.

    may_lack: a directory without any gets one that refuses text.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return Tokenizer(*load_gguf_tokenizer(path))
    if may_lack and not any((path / name).exists() for name in ("tokenizer.json", *_CONVERTIBLE)):
        return NoTokenizer()
    config = _read_json(path / "tokenizer_config.json")
    backend = _backend(path, config)
    special = _special_tokens(path, config)
    _apply_bos_and_eos(backend, config, special)
    return Tokenizer(backend, _info(path, backend, config, special))


def _backend(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    if (path / "tokenizer.json").exists():
        try:
            return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path / 'tokenizer.json'}: {error}") from error
    vocab, merges = path / "vocab.json", path / "merges.txt"
    if vocab.exists() and merges.exists() and config.get("tokenizer_class", "GPT2Tokenizer") == "GPT2Tokenizer":
        return _gpt2(vocab, merges, config)
    if any((path / name).exists() for name in _CONVERTIBLE):
        return _convert_with_transformers(path)
    raise ModelError(f"{path}: no tokenizer (expected tokenizer.json, vocab.json and merges.txt, or tokenizer.model)")


def _gpt2(vocab: Path, merges: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """GPT-2 and OPT as first published, without a tokenizer.json."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
    backend.decoder = decoders.ByteLevel()
    return backend


def _convert_with_transformers(path: Path) -> tokenizers.Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelError(f"{path}: converting this tokenizer needs transformers: pip install 'headway[hf]'") from None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # whatever a converter raises, the checkpoint is what cannot be used
        raise ModelError(f"{path}: transformers cannot load its tokenizer ({error})") from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), tokenizers.Tokenizer):
        raise ModelError(f"{path}: {type(tokenizer).__name__} has no fast form; save a tokenizer.json with it")
    return tokenizer.backend_tokenizer


def _special_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    named = {**_read_json(path / "special_tokens_map.json"), **config}
    # A token is written as its text, or as an object with its content.
    texts = {name: _text(named.get(name)) for name in _SPECIAL_NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _apply_bos_and_eos(backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: dict[str, str]) -> None:
    """add_bos_token and add_eos_token, where a checkpoint sets them, overrule its tokenizer.json."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [t for t in special.values() if t not in known and backend.token_to_id(t) is not None]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in missing])
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    add_bos_and_eos(backend, bos, eos)


def _info(
    path: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: dict[str, str]
) -> TokenizerInfo:
    generation = _read_json(path / "generation_config.json") or _read_json(path / "config.json")
    declared = generation.get("eos_token_id")
    own = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    ids = [own, *(declared if isinstance(declared, list) else [declared])]
    return TokenizerInfo(
        eos_token_ids=tuple(dict.fromkeys(i for i in ids if i is not None)),
        bos_token_id=backend.token_to_id(special["bos_token"]) if "bos_token" in special else None,
        special_tokens=special,
        chat_templates=_chat_templates(path, config),
    )


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    declared = config.get("chat_template")
    if isinstance(declared, list):
        templates = {entry["name"]: entry["template"] for entry in declared}
    else:
        templates = {"default": declared} if declared else {}
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = file.read_text(encoding="utf-8")
    if (path / "chat_template.jinja").exists():
        templates["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    return templates


def _read_json(path: Path) -> dict[str, Any]:
    """An absent file is an empty one."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return content
