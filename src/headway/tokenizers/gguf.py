"""A tokenizer from GGUF metadata: byte-level BPE ("gpt2") and sentencepiece BPE with byte fallback ("llama").

A GGUF file names its pre-tokenizer; the rules behind the names are those of the original models' tokenizer.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from headway.errors import ModelError
from headway.gguf import GGUFFile
from headway.tokenizers.special import add_bos_and_eos
from headway.tokenizers.tokenizer import TokenizerInfo

_CONTROL, _USER_DEFINED = 3, 4
_EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Rule(NamedTuple):
    """split: the pre-tokenizer's pattern; None is GPT-2's own. digits: every digit stands alone, spaces apart.

    whole_words: a word that is in the vocabulary is one token, whatever the merges say. bos: added unless the file
    says otherwise. nfc: text is brought to Unicode's composed form first.
    """

    split: str | None = None
    digits: bool = False
    whole_words: bool = False
    bos: bool = False
    nfc: bool = False


_RULES = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone"), _Rule()),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _Rule(digits=True)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _Rule(split=_LLAMA3, whole_words=True, bos=True)),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Rule(split=_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _Rule(split=_QWEN2, nfc=True)),
    "tekken": _Rule(split=_TEKKEN, whole_words=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _Rule(split=_GPT4O, whole_words=True)),
}


def load_gguf_tokenizer(path: Path) -> tuple[Tokenizer, TokenizerInfo]:
    """ModelError if the file has no tokenizer or one of a kind that is not known."""
    metadata = GGUFFile(path).whole_metadata()
    ggml = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")}
    build = {"gpt2": _byte_level, "llama": _sentencepiece}.get(ggml.get("model", ""))
    if build is None or not ggml.get("tokens"):
        raise ModelError(f"{path}: tokenizer.ggml.model={ggml.get('model')!r} is not supported; gpt2 and llama are")
    backend, default_bos = build(path, ggml)
    _mark_added_tokens(backend, ggml)
    tokens: list[str] = ggml["tokens"]
    special = {
        name: tokens[ggml[key]] for name, key in _SPECIAL_KEYS.items() if ggml.get(key, len(tokens)) < len(tokens)
    }
    bos, eos = (special.get(name) for name in ("bos_token", "eos_token"))
    add_bos_and_eos(
        backend,
        bos if ggml.get("add_bos_token", default_bos) else None,
        eos if ggml.get("add_eos_token", False) else None,
    )
    info = TokenizerInfo(
        eos_token_ids=tuple(dict.fromkeys(ggml[key] for key in _EOS_KEYS if key in ggml)),
        bos_token_id=ggml.get("bos_token_id"),
        special_tokens=special,
        chat_templates=_chat_templates(metadata),
    )
    return backend, info


def _byte_level(path: Path, ggml: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    name = ggml.get("pre", "default")
    rule = _RULES.get(name)
    if rule is None:
        raise ModelError(f"{path}: pre-tokenizer {name!r} is not known; known are {', '.join(_RULES)}")
    types = ggml.get("token_type") or [1] * len(ggml["tokens"])
    vocab = {
        _spell(t) if kind not in (_CONTROL, _USER_DEFINED) else t: i
        for i, (t, kind) in enumerate(zip(ggml["tokens"], types, strict=True))
    }
    merges = [tuple(merge.split(" ", 1)) for merge in ggml.get("merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole_words))
    tokenizer.normalizer = normalizers.NFC() if rule.nfc else None
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.bos


def _pre_tokenizer(rule: _Rule) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.split is None)
    if rule.digits:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if rule.split is None:
        return byte_level
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule.split), behavior="isolated"), byte_level])


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


_ALPHABET = _byte_alphabet()
_LETTERS = frozenset(_ALPHABET.values())


def _spell(token: str) -> str:
    """A token in the byte alphabet; some files write a few as plain text."""
    return token if _LETTERS.issuperset(token) else "".join(_ALPHABET[byte] for byte in token.encode())


def _sentencepiece(_path: Path, ggml: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    tokens: list[str] = ggml["tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(m.split(" ", 1)) for m in ggml["merges"]] if "merges" in ggml else _merges(vocab, ggml["scores"])
    unknown = tokens[ggml.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = ggml.get("add_space_prefix", True)
    scheme = "first" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True


def _merges(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The merges a sentencepiece vocabulary implies: every split of a token into two tokens, best score first."""
    found: list[tuple[float, int, int, int, int, tuple[str, str]]] = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                found.append((-scores[index], -len(left), -len(right), vocab[left], vocab[right], (left, right)))
    found.sort()
    return [pair for *_, pair in found]


def _mark_added_tokens(backend: Tokenizer, ggml: Mapping[str, Any]) -> None:
    kinds = list(zip(ggml["tokens"], ggml.get("token_type") or (), strict=False))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in kinds if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    named = {name: metadata.get(f"{key}.{name}") for name in metadata.get(f"{key}s", ())}
    return {name: text for name, text in {"default": metadata.get(key), **named}.items() if text}
