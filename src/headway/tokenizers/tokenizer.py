"""The tokenizer every other room sees: a `tokenizers` backend plus what a checkpoint says about special tokens.

The backend releases the GIL and is safe to share between threads. Nothing here changes after construction except a
cache of token spellings.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import tokenizers
from tokenizers.decoders import ByteLevel, DecodeStream

from headway.messages.params import check_text
from headway.tokenizers.bound import BYTES, ByteLevelBound

_Utf8 = codecs.getincrementaldecoder("utf-8")

# A decoder looks back one token at most (a leading space, a joined byte); a few more cost nothing.
CONTEXT_TOKENS = 6
# So short a text is encoded, in half a millisecond at most, without letting go of the interpreter: beside a busy thread
# getting that back takes as long (395 us against 27 us a text of five words).
SHORT_CHARS = 2000
# A character spans at most 4 byte tokens. Text still undecodable after this many tokens is really broken bytes.
MAX_PENDING_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """What a checkpoint declares beside the vocabulary.

    eos_token_ids: every id that ends a sequence, the tokenizer's own first. special_tokens: the names chat templates
    use (bos_token, eos_token, ...) to their text. chat_templates: name to jinja source; "default" is the usual one.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    special_tokens: dict[str, str] = field(default_factory=dict[str, str])
    chat_templates: dict[str, str] = field(default_factory=dict[str, str])


class Tokenizer:
    """Encodes and decodes; see TokenizerInfo for eos_token_ids, bos_token_id, special_tokens, chat_templates."""

    def __init__(self, backend: tokenizers.Tokenizer, info: TokenizerInfo) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = info.eos_token_ids
        self.bos_token_id = info.bos_token_id
        self.special_tokens = info.special_tokens
        self.chat_templates = info.chat_templates
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
        self._pieces: dict[int, str] = {}
        self._bytes: dict[int, bytes] = {}
        self._bytes_only = isinstance(backend.decoder, ByteLevel)  # its tokens read the same whatever is before them
        # Any ordinary token: what a piece looks like after it is what the piece contributes to a running text.
        self._anchor = backend.encode("a", add_special_tokens=False).ids[-1:]

    def fewest_tokens(self, text: str) -> int:
        """What the text has at least, found without tokenising it; 0 where nothing is certain."""
        return 0 if self._byte_level is None else self._byte_level.fewest_tokens(text)

    @cached_property
    def _byte_level(self) -> ByteLevelBound | None:
        return ByteLevelBound.of(self.backend)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        for text in texts:
            check_text(text)
        if len(texts) == 1 and len(texts[0]) <= SHORT_CHARS:
            return [self.backend.encode(texts[0], add_special_tokens=add_special_tokens).ids]
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids and token type ids of two texts joined the way the model expects (cross-encoders)."""
        for text in (first, second):
            check_text(text)
        encoding = self.backend.encode(first, second)
        return encoding.ids, encoding.type_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def decode_after(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """The text token_ids add to the prompt's: what stream() yields for them, all at once."""
        tail, before = ([], "") if self._bytes_only else self._tail(prompt_token_ids)
        if tail:
            text = self.decode([*tail, *token_ids], skip_special_tokens)
            if text.startswith(before):
                return text[len(before) :]
        return self.decode(token_ids, skip_special_tokens)

    def stream(self, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> TokenStream:
        """An incremental detokeniser for what follows the prompt."""
        if self._bytes_only:
            return _ByteStream(self, skip_special_tokens)
        return _ContextStream(self, prompt_token_ids, skip_special_tokens)

    def token_to_piece(self, token_id: int) -> str:
        """One token's text inside a running text (a leading space kept); U+FFFD where it is a part of a character."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self.decode_in_context(self._anchor, [token_id], False)
        return piece

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """Of byte-level BPE: a spelling has a character per byte, an added token's is its text."""
        known = self._bytes.get(token_id)
        if known is None:
            spelling = self.backend.id_to_token(token_id) or ""
            is_spelled = all(character in BYTES for character in spelling)
            known = bytes(BYTES[one] for one in spelling) if is_spelled else spelling.encode()
            self._bytes[token_id] = known
        return known

    def decode_in_context(self, context: list[int], token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if context:
            before = self.decode(context, skip_special_tokens)
            text = self.decode([*context, *token_ids], skip_special_tokens)
            if text.startswith(before):
                return text[len(before) :]
            # Byte tokens that form no character can change how the ones before them decode.
        return self.decode(token_ids, skip_special_tokens)

    def context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last ordinary tokens, which decide whether the next text starts with a space."""
        return self._tail(prompt_token_ids)[0]

    def _tail(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
        """context(), and its text."""
        tail = [t for t in prompt_token_ids[-4 * CONTEXT_TOKENS :] if t not in self._special_ids][-CONTEXT_TOKENS:]
        text = self.decode(tail) if tail else ""
        # A prompt may stop inside a character (token-id prompts); its bytes belong to no generated text.
        return ([], "") if text.endswith("\ufffd") else (tail, text)


class TokenStream(Protocol):
    """Text of one request as its tokens arrive; pieces and flush join to decode_after(), given valid characters."""

    def push(self, token_id: int) -> str:
        """The text this token completes; empty while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is held back, incomplete characters as U+FFFD."""
        ...


class _ByteStream:
    """For tokens that read the same whatever is before them: a tenth of what the library's own takes."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._decoder = _Utf8("replace")

    def push(self, token_id: int) -> str:
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class _ContextStream:
    """For all tokenizers."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._restart(tokenizer.context(prompt_token_ids))

    def _restart(self, context: list[int]) -> None:
        self._context, self._pending = context, list[int]()
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)

    def push(self, token_id: int) -> str:
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._tokenizer.backend, token_id)
        except Exception:  # the library's own type: bytes that were no character changed how the tokens before decode
            return self._emit_pending()
        if text is not None:
            self._context, self._pending = self._pending, []
            return text
        return self._emit_pending() if len(self._pending) > MAX_PENDING_TOKENS else ""

    def flush(self) -> str:
        return self._emit_pending() if self._pending else ""

    def _emit_pending(self) -> str:
        text = self._tokenizer.decode_in_context(self._context, self._pending, self._skip)
        self._restart(self._pending)
        return text
