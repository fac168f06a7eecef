"""From a prompt and parameters to engine requests: tokenised, checked against the model, defaults filled in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar

import msgspec
from msgspec.structs import replace

from headway.config import EngineConfig, ModelFacts
from headway.engine import GrammarBackend
from headway.errors import RequestError
from headway.llm.prompts import Prompt, PromptInput, as_input
from headway.messages import PoolingParams, Request, SamplingParams
from headway.messages.params import check_text
from headway.scheduler.checks import check_room
from headway.tokenizers import Tokenizer

Params = SamplingParams | PoolingParams
P = ParamSpec("P")
T = TypeVar("T")

# Encodings hold offsets and strings beside the ids; a batch of this size keeps them few and the threads busy.
TOKENIZE_BATCH = 512
_SEED_BITS = 64


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt ready to run: n engine requests, or one for pooling. delta: the caller wants tokens as they come."""

    request_id: str
    prompt: str | None
    params: Params
    requests: list[Request]
    delta: bool = False


@dataclass(frozen=True, slots=True)
class _Decided:
    """What follows from a SamplingParams and the model alone, once for all prompts that share it."""

    stop_token_ids: list[int]
    bad_words_ids: list[list[int]]
    needs_text: bool


class Processor:
    """Turns prompts into requests. Raises RequestError, before anything runs, for what the engine would refuse.

    config: the running engine's. grammar: compiles constraints ahead, so that a bad one is refused here.
    """

    def __init__(
        self, tokenizer: Tokenizer, facts: ModelFacts, config: EngineConfig, grammar: GrammarBackend | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._facts = facts
        self._config = config
        self._grammar = grammar
        self._random = random.Random(config.model.seed)
        self._eos = list(dict.fromkeys((*tokenizer.eos_token_ids, *facts.eos_token_ids)))
        self._bad_words = lru_cache(4)(self._tokenize_words)  # the prompts of one caller have the same

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        params: Params,
        *,
        delta: bool = False,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> Prepared:
        item = self._input(prompt)
        (token_ids,) = self._tokenize([item])
        decided = self._decide(params)
        return self._prepared(request_id, item, token_ids, params, decided, delta, priority, data_parallel_rank)

    def prepare_all(
        self, request_ids: Iterator[str], prompts: Sequence[Prompt], params: Sequence[Params]
    ) -> Iterator[Prepared]:
        """In order; an error names the prompt's place. Only a batch of encodings is held at a time."""
        for i, one in enumerate(self.prepare_each(request_ids, prompts, params)):
            if isinstance(one, RequestError):
                raise one if len(prompts) == 1 else RequestError(f"prompts[{i}].{one.field}", one.value, one.accepted)
            yield one

    def prepare_each(
        self, request_ids: Iterator[str], prompts: Sequence[Prompt], params: Sequence[Params]
    ) -> Iterator[Prepared | RequestError]:
        """In order, with the error of each prompt that is refused. Only a batch of encodings is held at a time."""
        decided: dict[int, tuple[Params, _Decided]] = {}  # by identity, which holds while the object is kept beside

        def prepared(item: PromptInput, token_ids: list[int], one: Params) -> Prepared:
            if id(one) not in decided:
                decided[id(one)] = one, self._decide(one)
            return self._prepared(next(request_ids), item, token_ids, one, decided[id(one)][1])

        for start in range(0, len(prompts), TOKENIZE_BATCH):
            end = start + TOKENIZE_BATCH
            items = [_tried(self._input, prompt) for prompt in prompts[start:end]]
            encoded = iter(self._tokenize([item for item in items if isinstance(item, PromptInput)]))
            for item, one in zip(items, params[start:end]):
                yield item if isinstance(item, RequestError) else _tried(prepared, item, next(encoded), one)

    def _input(self, prompt: Prompt) -> PromptInput:
        """Refuses a text that cannot be encoded, or cannot fit, before gigabytes, or other prompts, go with it."""
        item = as_input(prompt)
        text, length, limit = item.text or "", len(item.token_ids or ()), self._config.model.max_model_len
        if length > limit:
            raise RequestError("prompt", f"{length} tokens", f"prompt has {length} tokens; max_model_len is {limit}")
        check_text(text)
        check_text(item.cache_salt, "cache_salt")
        if len(text) > limit and (least := self._tokenizer.fewest_tokens(text)) > limit:
            accepted = f"prompt has at least {least} tokens; max_model_len is {limit}"
            raise RequestError("prompt", f"{len(text)} characters", accepted)
        return item

    def _tokenize(self, items: Sequence[PromptInput]) -> list[list[int]]:
        ids = [item.token_ids for item in items]
        for special in (True, False):
            at = [i for i, item in enumerate(items) if item.text is not None and item.add_special_tokens is special]
            if not at:
                continue
            texts = [items[i].text or "" for i in at]
            for i, encoded in zip(at, self._tokenizer.encode_batch(texts, special), strict=True):
                ids[i] = encoded
        return [one or [] for one in ids]

    def _prepared(
        self,
        request_id: str,
        item: PromptInput,
        token_ids: list[int],
        params: Params,
        decided: _Decided,
        delta: bool = False,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> Prepared:
        if item.text is None or max(token_ids, default=0) >= self._facts.vocab_size:
            self._check_ids("prompt_token_ids", token_ids)
        self._check_types(item.token_type_ids, len(token_ids))
        if type(priority) is not int:
            raise RequestError("priority", priority, "must be an integer; lower runs first")
        room = self._check_length(item, token_ids, int(isinstance(params, SamplingParams)))
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            token_type_ids=item.token_type_ids,
            cache_salt=item.cache_salt,
            priority=priority,
            data_parallel_rank=self._rank(data_parallel_rank),
        )
        if isinstance(params, PoolingParams):
            request.pooling = params
            requests = [request]
        else:
            request.sampling = params
            request.stream = delta or decided.needs_text
            request.max_tokens = min(params.max_tokens or room, room)
            request.stop_token_ids, request.bad_words_ids = decided.stop_token_ids, decided.bad_words_ids
            requests = self._samples(request, params)
        check_room(request, self._config)
        return Prepared(request_id=request_id, prompt=item.text, params=params, requests=requests, delta=delta)

    def _samples(self, request: Request, params: SamplingParams) -> list[Request]:
        """One for each, with a seed of its own."""
        first = params.seed if params.seed is not None else self._random.getrandbits(_SEED_BITS)
        name, seeds = request.request_id, [(first + i) % (1 << _SEED_BITS) for i in range(params.n)]
        if params.n > 1:
            return [replace(request, request_id=f"{name}/{i}", seed=seed) for i, seed in enumerate(seeds)]
        request.seed = seeds[0]
        return [request]

    def _check_length(self, item: PromptInput, token_ids: list[int], generated: int) -> int:
        """How many tokens fit after the prompt; at least ``generated`` must."""
        limit, length = self._config.model.max_model_len, len(token_ids)
        if not length:
            field = "prompt_token_ids" if item.text is None else "prompt"
            raise RequestError(
                field, token_ids if item.text is None else item.text, "prompt has 0 tokens; at least 1 is needed"
            )
        if length + generated > limit:
            room = f", of which {generated} must be left to generate" if generated and length == limit else ""
            raise RequestError(
                "prompt", f"{length} tokens", f"prompt has {length} tokens; max_model_len is {limit}{room}"
            )
        return limit - length

    def _check_ids(self, field: str, token_ids: Iterable[int]) -> None:
        size = self._facts.vocab_size
        for token in token_ids:
            if type(token) is not int or not 0 <= token < size:
                raise RequestError(field, token, f"token ids of this model are 0 to {size - 1}")

    def _rank(self, rank: int | None) -> int | None:
        size = self._config.parallel.data_parallel_size
        if rank is not None and (type(rank) is not int or not 0 <= rank < size):
            raise RequestError("data_parallel_rank", rank, f"must be a replica, 0 to {size - 1}")
        return rank

    def _check_types(self, types: list[int] | None, num_tokens: int) -> None:
        kinds = range(max(1, self._facts.token_types))
        if types is not None and not (len(types) == num_tokens and all(type(t) is int and t in kinds for t in types)):
            raise RequestError("token_type_ids", types, f"must be one per prompt token, each 0 to {kinds[-1]}")

    def _decide(self, params: Params) -> _Decided:
        """Checks parameters against the model."""
        kind: type[Any] = type(params)
        if kind not in (SamplingParams, PoolingParams):
            raise RequestError("params", params, "must be SamplingParams, or PoolingParams to embed and classify")
        if isinstance(params, PoolingParams):
            self._check_pooling(params)
            return _Decided([], [], False)
        if self._config.model.runner == "pooling":
            raise RequestError(
                "sampling", self._facts.architecture, "this model embeds and classifies; it cannot generate"
            )
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        for field in ("logprobs", "prompt_logprobs"):
            count = getattr(params, field)
            if count is not None and count > self._facts.vocab_size:
                raise RequestError(field, count, f"the vocabulary has {self._facts.vocab_size} tokens")
        if params.structured is not None and self._grammar is not None:
            self._grammar.compile(params.structured)
        eos = [] if params.ignore_eos else self._eos
        return _Decided(
            stop_token_ids=list(dict.fromkeys((*eos, *(params.stop_token_ids or ())))),
            bad_words_ids=self._bad_words(tuple(params.bad_words or ())),
            needs_text=bool(params.stop_strings),
        )

    def _check_pooling(self, params: PoolingParams) -> None:
        labels = self._facts.num_labels
        if params.task == "classify" and not labels:
            raise RequestError("task", "classify", "this model has no classification head; embed is accepted")
        if params.task == "score" and labels != 1:
            raise RequestError("task", "score", f"needs a model with one label, this one has {labels}")
        if params.dimensions is not None and params.dimensions > self._facts.hidden_size:
            raise RequestError("dimensions", params.dimensions, f"must be at most {self._facts.hidden_size}")

    def _tokenize_words(self, words: tuple[str, ...]) -> list[list[int]]:
        """Each word as it starts a text and as it follows a space: they are different tokens."""
        if not all(word.strip() for word in words):
            raise RequestError("bad_words", list(words), "a word must have a character that is not a space")
        forms = [form for word in words for form in (word.lstrip(), " " + word.lstrip())]
        unique = dict.fromkeys(tuple(ids) for ids in self._tokenizer.encode_batch(forms, add_special_tokens=False))
        return [list(ids) for ids in unique]


def _tried(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | RequestError:
    try:
        return function(*args, **kwargs)
    except RequestError as error:
        return error
