"""How few tokens a text can have, where a tokenizer makes that certain."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

# NFC maps a code point to one of a third of its bytes at best, and composes three times its own bytes at best.
_NFC_SHRINKS = 9
_KEEPS_TEXT = ("ByteLevel", "Digits", "Split")


@dataclass(frozen=True, slots=True)
class ByteLevelBound:
    """longest: bytes of UTF-8 text that one token stands for at most. dropped: bytes that no token stands for."""

    longest: int
    dropped: bytes

    @classmethod
    def of(cls, backend: Tokenizer) -> ByteLevelBound | None:
        """None unless it is byte-level BPE, which keeps the text; WordPiece makes a word of any length one [UNK]."""
        normalizer, splits = _parts(backend.normalizer), _parts(backend.pre_tokenizer)
        vocabulary = backend.get_vocab()
        dropped = bytes(byte for byte, spelling in enumerate(_alphabet()) if spelling not in vocabulary)
        certain = (
            isinstance(backend.model, BPE)
            and backend.model.unk_token is None
            and any(part["type"] == "ByteLevel" for part in splits)
            and all(part["type"] in _KEEPS_TEXT and part.get("behavior") != "Removed" for part in splits)
            and (not normalizer or (all(part["type"] == "NFC" for part in normalizer) and not dropped))
            and not any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
        )
        if not certain:
            return None
        # A spelling has a character per byte; an added token's is its text.
        longest = max(len(spelling.encode()) for spelling in vocabulary)
        return cls(longest * (_NFC_SHRINKS if normalizer else 1), dropped)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound; lone surrogates count as what stands for them."""
        kept = len(text.encode(errors="replace").translate(None, self.dropped))
        return -(-kept // self.longest)


def _alphabet() -> list[str]:
    """Byte-level BPE's spelling of each byte: itself where Latin-1 prints it, else what follows Latin-1, in order."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printed else chr(next(others)) for byte in range(0x100)]


BYTES = {spelling: byte for byte, spelling in enumerate(_alphabet())}


def _parts(component: Any) -> list[dict[str, Any]]:
    """What a normaliser or pre-tokenizer is made of, as tokenizer.json spells it."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return state.get("pretokenizers") or state.get("normalizers") or [state]
