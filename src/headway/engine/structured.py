"""Structured output by llguidance: grammars are walked token by token, nothing is compiled ahead for a vocabulary."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from headway.config import ModelFacts
from headway.errors import MissingDependencyError, ModelError, RequestError
from headway.messages import StructuredOutput
from headway.tokenizers import Tokenizer

T = TypeVar("T")

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SOURCE_CHARS = {"json": 64 << 10, "regex": 16 << 10, "choice": 512 << 10, "grammar": 16 << 10}
STACK_BYTES = 256 << 20
"""llguidance recurses: a chain of 1000 definitions overflows the usual 8 MiB, which ends the process."""
MAX_FIRST_STEP_S = 0.5
"""What the first step takes is a hint at what others of the batch would wait for at each."""
CACHED_CONSTRAINTS = 64
# llguidance's other limits hold as they are: about 20 ms to build a grammar, 15 ms to scan a step's tokens.
MAX_LEXER_STATES = 50_000  # 1-2 kB each
# Parser items a position may have: at the library's 2000, an ambiguous grammar takes 0.3 s a step; at 500, 10 ms. A
# JSON object needs 4 per optional property.
MAX_ITEMS = 500
# Without a bound, a small model that is unsure what comes next writes spaces until max_tokens.
JSON_OPTIONS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,20}"}


class LLGuidanceBackend:
    """A GrammarBackend. Safe to share between threads; the tokenizer's tables are built on first use (0.2 s).

    tokenizer_json: what tokenizers.Tokenizer.to_str() returns. vocab_size: the model's, which may exceed the
    tokenizer's. eos_token_ids: allowed exactly where the text is complete.
    """

    def __init__(self, tokenizer_json: Callable[[], str], vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab_size = vocab_size
        self._eos = tuple(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[bytes, LLMatcher] = OrderedDict()

    def compile(self, constraint: StructuredOutput) -> LLGuidanceMatcher:
        """Raises RequestError naming the constraint's field, MissingDependencyError without llguidance.

        ModelError for a tokenizer that llguidance does not know how to read.
        """
        field = next(f for f in constraint.__struct_fields__ if getattr(constraint, f) is not None)
        key = msgspec.json.encode(constraint)
        value = getattr(constraint, field)
        if len(key) > MAX_SOURCE_CHARS[field]:
            raise RequestError(f"structured.{field}", value, f"must be at most {MAX_SOURCE_CHARS[field]} characters")
        matcher = self._known(key) or _with_stack(lambda: self._build(key, field, value))
        return LLGuidanceMatcher(matcher, self._eos)

    def _known(self, key: bytes) -> LLMatcher | None:
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is None:
                return None
            self._compiled.move_to_end(key)
            return matcher.deep_copy()

    def _build(self, key: bytes, field: str, value: Any) -> LLMatcher:
        """Takes up to tens of milliseconds, without the lock."""
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            message = "structured output needs llguidance: pip install 'headway[grammar]'"
            raise MissingDependencyError(message) from error
        try:
            source = _SOURCES[field](value, LLMatcher)
        except ValueError as error:  # such as a number that no machine word holds
            raise RequestError(f"structured.{field}", value, str(error)) from error
        limits = LLParserLimits(max_items_in_row=MAX_ITEMS, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tables(), source, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"structured.{field}", value, matcher.get_error())
        began = time.perf_counter()
        matcher.compute_bitmask()
        if time.perf_counter() - began > MAX_FIRST_STEP_S:
            raise RequestError(f"structured.{field}", value, "is too complex: its first step takes too long")
        with self._lock:
            self._compiled[key] = matcher
            if len(self._compiled) > CACHED_CONSTRAINTS:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()

    def _tables(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._lock:
            if self._tokenizer is None:
                eos = list(self._eos) or None
                try:
                    self._tokenizer = LLTokenizer(self._tokenizer_json(), n_vocab=self._vocab_size, eos_token=eos)
                except ValueError as error:
                    raise ModelError(f"llguidance cannot constrain this model's tokenizer: {error}") from error
            return self._tokenizer


_starting = threading.Lock()


def _with_stack(work: Callable[[], T]) -> T:
    """On a thread of its own, whose stack is large."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    with _starting:
        usual = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="headway-grammar", daemon=True).start()
        finally:
            threading.stack_size(usual)
    return done.result()


class LLGuidanceMatcher:
    """A Matcher; see the port for what mask and accept mean.

    A text that makes the constraint too complex to go on is a dead end: only end-of-sequence ids are allowed then, and
    not accepted, which ends the request with an error.
    """

    def __init__(self, matcher: LLMatcher, eos_token_ids: tuple[int, ...]) -> None:
        self._matcher = matcher
        self._eos = eos_token_ids

    def mask(self) -> bytes:
        return self._matcher.compute_bitmask()

    def accept(self, token_id: int) -> bool:
        if token_id in self._eos:
            return self._matcher.is_accepting() and not self._matcher.is_error()
        return self._matcher.try_consume_tokens([token_id]) == 1


def _json_source(value: dict[str, Any] | str, compiler: type[LLMatcher]) -> str:
    try:
        schema = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RequestError("structured.json", value, f"must be a JSON schema ({error})") from error
    if not isinstance(schema, dict):
        raise RequestError("structured.json", value, "must be a JSON schema: an object")
    return compiler.grammar_from_json_schema(schema or {"type": "object"}, overrides=JSON_OPTIONS)  # type: ignore[arg-type]


def _regex_source(value: str, compiler: type[LLMatcher]) -> str:
    return compiler.grammar_from_regex(value)


def _choice_source(value: list[str], compiler: type[LLMatcher]) -> str:
    if not value or not all(value):
        raise RequestError("structured.choice", value, "must be a list of at least one non-empty string")
    return compiler.grammar_from_lark("start: " + " | ".join(json.dumps(choice) for choice in value))


def _grammar_source(value: str, compiler: type[LLMatcher]) -> str:
    return compiler.grammar_from_lark(value)


_SOURCES: dict[str, Callable[[Any, type[LLMatcher]], str]] = {
    "json": _json_source,
    "regex": _regex_source,
    "choice": _choice_source,
    "grammar": _grammar_source,
}


def make_grammar(tokenizer: Tokenizer, facts: ModelFacts) -> LLGuidanceBackend:
    eos = dict.fromkeys((*tokenizer.eos_token_ids, *facts.eos_token_ids))
    return LLGuidanceBackend(tokenizer.backend.to_str, facts.vocab_size, list(eos))
