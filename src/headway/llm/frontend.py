"""What LLM and AsyncLLM share: everything between the caller's words and the engine's tokens, but the loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from headway.config import EngineArgs, EngineConfig, ModelFacts, machine_facts, resolve
from headway.engine import EngineCore, EngineMetrics
from headway.engine.launch import load
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
from headway.tokenizers import Tokenizer

if TYPE_CHECKING:
    from headway.engine.port import EngineClient
    from headway.engine.supervise import OnDeath

C = TypeVar("C", bound="Client[Any]")
E = TypeVar("E", bound="Measured")


class Measured(Protocol):
    def metrics(self) -> EngineMetrics: ...


@dataclass(frozen=True, slots=True)
class Frontend:
    """The text side of one model. config, info: of the engine as it started. sampling: what holds for callers that
    give no SamplingParams."""

    facts: ModelFacts
    tokenizer: Tokenizer
    config: EngineConfig
    info: WorkerInfo
    processor: Processor
    chat: ChatRenderer
    sampling: SamplingParams

    @classmethod
    def over(
        cls,
        config: EngineConfig,
        info: WorkerInfo,
        facts: ModelFacts,
        tokenizer: Tokenizer,
        grammar: LLGuidanceBackend,
        sampling: SamplingParams | None = None,
    ) -> Frontend:
        processor = Processor(tokenizer, facts, config, grammar)
        return cls(facts, tokenizer, config, info, processor, ChatRenderer(tokenizer), sampling or SamplingParams())


@dataclass(frozen=True, slots=True)
class Resolved:
    """What is known of a model before it runs. tokenizer: the path of its files."""

    facts: ModelFacts
    config: EngineConfig
    sampling: SamplingParams
    tokenizer: str


def find(model: str, **engine_args: Any) -> Resolved:
    """Finds the model, decides every setting. engine_args: fields of EngineArgs.

    Raises ConfigError for a setting, ModelError for a model, that cannot be used.
    """
    args = EngineArgs.from_kwargs(model=model, **engine_args)
    path = resolve_source(args.model, args.revision, load_format=args.load_format)
    facts = describe(path)
    config = resolve(args, facts, machine_facts(), str(path))
    tokenizer = path if args.tokenizer is None else resolve_source(args.tokenizer, setting="tokenizer")
    return Resolved(facts, config, default_sampling(path), str(tokenizer))


def start(found: Resolved, on_death: OnDeath = "restart") -> tuple[Frontend, EngineCore | EngineClient]:
    """Loads the model, in this process or replicas of it in others. on_death: what the death of a replica means."""
    if found.config.parallel.data_parallel_size > 1:
        from headway.llm.replicas import start_replicas

        return start_replicas(found, on_death)
    core, tokenizer, grammar = load(found.config, found.facts, found.tokenizer)
    logging.getLogger("headway").info("%s: %s", core.config.model.served_model_name, core.info)
    return Frontend.over(core.config, core.info, found.facts, tokenizer, grammar, found.sampling), core


class Client(Generic[E]):
    """The part of LLM and AsyncLLM that is the same."""

    _frontend: Frontend
    _engine: E

    def __init__(self, model: str, **engine_args: Any) -> None:
        """model: a known name, a Hugging Face directory or hub id, or a .gguf file; engine_args: see EngineArgs."""
        self._attach(*start(find(model, **engine_args)))

    @classmethod
    def over(cls: type[C], frontend: Frontend, engine: EngineCore | EngineClient) -> C:
        """A client for a model that runs already; closing it closes the engine."""
        client = cls.__new__(cls)
        client._attach(frontend, engine)
        return client

    def _attach(self, frontend: Frontend, engine: EngineCore | EngineClient) -> None:
        raise NotImplementedError

    @property
    def config(self) -> EngineConfig:
        """Every resolved setting; ``choices`` says why each has its value."""
        return self._frontend.config

    @property
    def facts(self) -> ModelFacts:
        """What the checkpoint says of itself."""
        return self._frontend.facts

    @property
    def executor_info(self) -> WorkerInfo:
        """Where the step runs and why, on how many ranks, with which threads, kernels, capacity and start-up times."""
        return self._frontend.info

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
        return self._engine.metrics()

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
