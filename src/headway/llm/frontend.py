"""What LLM and AsyncLLM share: everything between the caller's words and the engine's tokens, but the loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from headway.config import EngineArgs, EngineConfig, ModelFacts, machine_facts, resolve
from headway.engine import EngineCore, EngineMetrics, launch
from headway.engine.structured import LLGuidanceBackend
from headway.llm.chat import ChatRenderer, Message
from headway.llm.defaults import default_sampling
from headway.llm.processor import Processor
from headway.llm.prompts import PromptInput
from headway.llm.scoring import Scoring
from headway.llm.tools import ToolParser
from headway.messages import SamplingParams
from headway.messages.worker import WorkerInfo
from headway.models.describe import describe
from headway.models.source import resolve_source
from headway.tokenizers import Tokenizer, load_tokenizer

C = TypeVar("C", bound="Client")


@dataclass(frozen=True, slots=True)
class Frontend:
    """One model, loaded and running. sampling: what holds for callers that give no SamplingParams."""

    facts: ModelFacts
    tokenizer: Tokenizer
    core: EngineCore
    processor: Processor
    chat: ChatRenderer
    sampling: SamplingParams

    @classmethod
    def over(
        cls,
        core: EngineCore,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        grammar: LLGuidanceBackend,
        sampling: SamplingParams | None = None,
    ) -> Frontend:
        processor = Processor(tokenizer, facts, core.config, grammar)
        return cls(facts, tokenizer, core, processor, ChatRenderer(tokenizer), sampling or SamplingParams())


def start(model: str, **engine_args: Any) -> Frontend:
    """Finds the model, decides every setting, loads. engine_args: fields of EngineArgs.

    Raises ConfigError for a setting, ModelError for a model, that cannot be used.
    """
    args = EngineArgs.from_kwargs(model=model, **engine_args)
    path = resolve_source(args.model, args.revision, load_format=args.load_format)
    facts = describe(path)
    config = resolve(args, facts, machine_facts(), str(path))
    sampling = default_sampling(path)
    tokenizer_path = path if args.tokenizer is None else resolve_source(args.tokenizer, setting="tokenizer")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(_read_tokenizer, tokenizer_path, facts, config.model.load_format == "dummy")
        core = launch(config, lambda: reading.result()[1])
    tokenizer, grammar = reading.result()
    logging.getLogger("headway").info("%s: %s", config.model.served_model_name, core.info)
    return Frontend.over(core, facts, tokenizer, grammar, sampling)


def _read_tokenizer(path: Path, facts: ModelFacts, may_lack: bool) -> tuple[Tokenizer, LLGuidanceBackend]:
    tokenizer = load_tokenizer(path, may_lack=may_lack)
    return tokenizer, make_grammar(tokenizer, facts)


def make_grammar(tokenizer: Tokenizer, facts: ModelFacts) -> LLGuidanceBackend:
    eos = dict.fromkeys((*tokenizer.eos_token_ids, *facts.eos_token_ids))
    return LLGuidanceBackend(tokenizer.backend.to_str, facts.vocab_size, list(eos))


class Client:
    """The part of LLM and AsyncLLM that is the same."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        """model: a known name, a Hugging Face directory or hub id, or a .gguf file; engine_args: see EngineArgs."""
        self._attach(start(model, **engine_args))

    @classmethod
    def over(cls: type[C], frontend: Frontend) -> C:
        """A client for a model that runs already; closing it closes the model."""
        client = cls.__new__(cls)
        client._attach(frontend)
        return client

    def _attach(self, frontend: Frontend) -> None:
        self._frontend = frontend

    @property
    def config(self) -> EngineConfig:
        """Every resolved setting; ``choices`` says why each has its value."""
        return self._frontend.core.config

    @property
    def facts(self) -> ModelFacts:
        """What the checkpoint says of itself."""
        return self._frontend.facts

    @property
    def executor_info(self) -> WorkerInfo:
        """Where the step runs and why, on how many ranks, with which threads, kernels, capacity and start-up times."""
        return self._frontend.core.info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._frontend.tokenizer

    @cached_property
    def tools(self) -> ToolParser:
        """Finds tool calls in what this model writes."""
        return ToolParser("\n".join(self.tokenizer.chat_templates.values()))

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where a caller passes none: the checkpoint's generation_config.json, else our own defaults."""
        return self._frontend.sampling

    def metrics(self) -> EngineMetrics:
        """Counters and times since the start; ``times.since(earlier.times)`` is what a stretch of work took."""
        return self._frontend.core.metrics()

    def chat_prompt(self, messages: Sequence[Message], **options: Any) -> PromptInput:
        """What chat() runs. options: see ChatRenderer.render."""
        # The template writes the special tokens out.
        return PromptInput(text=self._frontend.chat.render(messages, **options), add_special_tokens=False)

    def scoring(self, text_1: str | list[str], text_2: str | list[str]) -> Scoring:
        """What score() runs, and what it makes of the outputs."""
        facts = self._frontend.facts
        return Scoring(
            text_1, text_2, self.tokenizer, cross_encoder=facts.num_labels == 1, segments=facts.token_types > 1
        )
