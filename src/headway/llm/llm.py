"""The engine for a plain function call: prompts in, outputs in the same order."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from headway.engine import EngineCore
from headway.errors import RequestError
from headway.llm.chat import Message
from headway.llm.frontend import Client, Frontend
from headway.llm.interrupts import DeferredInterrupt
from headway.llm.outputs import Result, make_result
from headway.llm.processor import Params, Prepared
from headway.llm.prompts import Prompt, as_prompts
from headway.messages import EngineOutput, PooledOutput, PoolingParams, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from headway.engine.port import EngineClient
    from headway.engine.stepped import Stepped
    from headway.engine.upkeep import Weights

OnOutput = Callable[[Any], None]


class LLM(Client["EngineCore | Stepped"]):
    """One model in this process. Calls from several threads take turns.

    Every method checks all prompts before any runs: RequestError names the one that cannot be honoured. Ctrl-C ends
    the running requests and leaves the engine usable. use_tqdm shows a progress bar; on_output is called with each
    output as it finishes, in any order.
    """

    def _attach(self, frontend: Frontend, engine: EngineCore | EngineClient) -> None:
        self._frontend, self._engine = frontend, engine if isinstance(engine, EngineCore) else _stepped(engine)
        self._turn = threading.Lock()
        self._ids = map(str, itertools.count())

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_output: Callable[[RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Completes each prompt. sampling_params: one for all, or one per prompt; None: the model's own defaults."""
        return self._run(as_prompts(prompts), self._sampling(sampling_params), use_tqdm, on_output)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        on_output: Callable[[RequestOutput], None] | None = None,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of several. template: tools and what else ChatRenderer.render takes."""
        one = len(messages) > 0 and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if one else messages)
        prompts = [self.chat_prompt(conversation, **template) for conversation in conversations]
        return self._run(prompts, self._sampling(sampling_params), use_tqdm, on_output)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[PooledOutput]:
        """One vector per prompt, pooled and normalised as the model declares."""
        return self._run(as_prompts(prompts), pooling_params or PoolingParams(task="embed"), use_tqdm)

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = False,
    ) -> list[PooledOutput]:
        """One number per label and prompt: probabilities, or a value where the model is a regression."""
        return self._run(as_prompts(prompts), pooling_params or PoolingParams(task="classify"), use_tqdm)

    def score(self, text_1: str | list[str], text_2: str | list[str], *, use_tqdm: bool = False) -> list[PooledOutput]:
        """One number per pair: a cross-encoder's where the model has a one-label head, else the embeddings' cosine."""
        scoring = self.scoring(text_1, text_2)
        outputs: list[PooledOutput] = self._run(scoring.prompts, scoring.params, use_tqdm)
        return scoring.results(outputs)

    def update_weights(self, weights: Weights) -> None:
        """Other weights of the same shapes, in the memory of those before, for the calls that follow.

        weights: a dict or (name, tensor) pairs with a checkpoint's names, all of them, best in its order: what comes
        long before its layer is held until then; or a checkpoint's path, which every worker reads. Workers in other
        processes get tensors through a temporary file. Waits for running calls of other threads. ModelError for weights
        that do not fit: then requests are refused until an update succeeds.
        """
        with self._turn:
            self._engine.upkeep.update_weights(weights)

    def sleep(self, level: Literal[1, 2] = 1) -> None:
        """Gives back the KV cache's memory, at level 2 the weights' too; requests are refused until wake_up().

        Waits for running calls of other threads.
        """
        with self._turn:
            self._engine.upkeep.sleep(level)

    def wake_up(self) -> None:
        """After sleep(2) without an update_weights() since: reads the weights that the model was loaded with again."""
        with self._turn:
            self._engine.upkeep.wake_up()

    def close(self) -> None:
        """Ends the engine; idempotent."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _sampling(self, given: SamplingParams | Sequence[SamplingParams] | None) -> Params | Sequence[Params]:
        return self.get_default_sampling_params() if given is None else given

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Params | Sequence[Params],
        use_tqdm: bool,
        on_output: OnOutput | None = None,
    ) -> list[Any]:
        each = _one_each(params, len(prompts))
        prepared = deque(self._frontend.processor.prepare_all(self._ids, prompts, each))
        with self._turn, DeferredInterrupt() as interrupt, _progress(use_tqdm, len(prompts)) as shown:
            run = _Run(self._frontend, self._engine, prepared)
            try:
                while not run.done:
                    for output in run.step():
                        shown(output)
                        if on_output is not None:
                            on_output(output)
                    interrupt.check()
            except BaseException:
                run.abort()
                raise
        return run.outputs


class _Run:
    """One call's requests on the engine. Few wait inside it at a time: the rest costs the scheduler nothing."""

    def __init__(self, frontend: Frontend, engine: EngineCore | Stepped, prepared: deque[Prepared]) -> None:
        self._core = engine
        self._tokenizer = frontend.tokenizer
        self._prepared = prepared
        self._window = 2 * frontend.config.scheduler.max_num_seqs * frontend.config.parallel.data_parallel_size
        self._running: dict[str, tuple[int, Result]] = {}
        self._next = 0
        self.outputs: list[Any] = [None] * len(prepared)

    @property
    def done(self) -> bool:
        """Nothing runs, and the engine is idle again."""
        return not self._prepared and not self._running and not self._core.has_work()

    def step(self) -> list[Any]:
        """One step of the engine; the outputs that it finished."""
        while self._prepared and len(self._running) < self._window:
            self._add(self._prepared.popleft())
        finished = [self._feed(output) for output in self._core.step()]
        return [output for output in finished if output is not None]

    def abort(self) -> None:
        """Ends what still runs and takes in what the engine has to say about it."""
        if self._core.has_work():
            self._core.abort(list(self._running))
        while self._core.has_work():
            self._core.step()

    def _add(self, prepared: Prepared) -> None:
        entry = self._next, make_result(self._tokenizer, prepared)
        self._next += 1
        for request in prepared.requests:
            self._running[request.request_id] = entry
            self._core.add(request)

    def _feed(self, output: EngineOutput) -> RequestOutput | PooledOutput | None:
        entry = self._running.get(output.request_id)
        if entry is None:
            return None
        index, result = entry
        finished, must_abort = result.feed(output)
        if must_abort:
            self._core.abort([output.request_id])
        if must_abort or output.finish_reason is not None:
            del self._running[output.request_id]
        if finished is not None:
            self.outputs[index] = finished
        return finished


def _stepped(engine: EngineClient) -> Stepped:
    from headway.engine.stepped import Stepped

    return Stepped(engine)


@contextmanager
def _progress(wanted: bool, total: int) -> Generator[OnOutput]:
    """A bar of prompts, if it is wanted, with the rate of generated tokens."""
    if not wanted:
        yield lambda output: None
        return
    from tqdm import tqdm

    tokens = 0

    def show(output: RequestOutput | PooledOutput) -> None:
        nonlocal tokens
        if isinstance(output, RequestOutput):
            tokens += sum(len(c.token_ids) for c in output.outputs)
            elapsed = bar.format_dict["elapsed"] or 1e-9
            bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s", refresh=False)
        bar.update()

    with tqdm(total=total, unit="prompt", dynamic_ncols=True) as bar:
        yield show


def _one_each(params: Params | Sequence[Params], count: int) -> Sequence[Params]:
    if isinstance(params, (SamplingParams, PoolingParams)):
        return [params] * count
    if len(params) != count:
        raise RequestError("params", f"{len(params)} of them", f"give one for all, or one for each of {count} prompts")
    return params
