"""/v1/completions."""

from __future__ import annotations

from functools import partial

from headway.engine.port import Pause
from headway.llm.prompts import PromptInput
from headway.messages import Completion, RequestOutput, SamplingParams
from headway.server.answers import (
    TEXT,
    Chunks,
    Record,
    Usage,
    encode,
    head,
    text_choice,
    text_logprobs,
    usage_of,
)
from headway.server.endpoint import Answer, Write
from headway.server.generation import check, check_end, run, sampling, whole
from headway.server.protocol import CompletionRequest, prompts_of
from headway.server.state import State


async def completions(state: State, request: CompletionRequest) -> Answer:
    check(state, request)
    # The engine generates at least one token; where none is asked for, it is not shown.
    params = sampling(request, state.completion_defaults, **({"max_tokens": 1} if _is_echo_alone(request) else {}))
    prompts = prompts_of("prompt", request.prompt, state.most)
    if request.stream:
        return partial(_stream, state, prompts, params, request)
    outputs = await whole(state, prompts, params, request)
    choices: list[Record] = []
    for output in outputs:
        for sample in output.outputs:
            if _is_echo_alone(request):
                _clear(sample)
            choices.append(_Choice(state, request).feed(output, sample))
            if request.prompt_logprobs is not None:
                choices[-1]["prompt_logprobs"] = output.prompt_logprobs
    common = head("cmpl", "text_completion", state.names[0])
    return encode({**common, "choices": choices, "usage": usage_of(outputs).record()})


def _is_echo_alone(request: CompletionRequest) -> bool:
    return bool(request.echo) and request.max_tokens == 0


def _clear(sample: Completion) -> None:
    check_end(sample)
    sample.text, sample.token_ids, sample.logprobs = "", [], sample.logprobs and []
    sample.finish_reason, sample.stop_reason = "length", None


async def _stream(
    state: State, prompts: list[PromptInput], params: SamplingParams, request: CompletionRequest, write: Write
) -> bytes:
    """Text alone is put between bytes that are there already: most chunks have nothing else."""
    usage = Usage()
    chunks = Chunks(head("cmpl", "text_completion", state.names[0]), request.stream_options, usage)
    is_bare = params.logprobs is None and not chunks.continuous
    choices: dict[int, _Choice] = {}
    around: dict[int, tuple[bytes, bytes]] = {}
    echo_alone = _is_echo_alone(request)

    def take(output: RequestOutput) -> Pause | None:
        (sample,) = output.outputs
        if echo_alone:
            _clear(sample)
        usage.completion += len(sample.token_ids)
        cut = around.get(sample.index)
        if cut is not None and sample.finish_reason is None:
            return write(cut[0] + encode(sample.text) + cut[1] if sample.text else b"")
        check_end(sample)
        if sample.index not in choices:
            choices[sample.index] = _Choice(state, request)
            if is_bare:
                plain = Completion(index=sample.index, text=TEXT, token_ids=[])
                around[sample.index] = chunks.around(text_choice(plain, None))
            if sample.index % params.n == 0:
                usage.add_prompt(output)
        return write(chunks.event(choices[sample.index].feed(output, sample)))

    await run(state, prompts, params, request, take)
    return chunks.end()


class _Choice:
    """One sample, whole or in pieces; with echo, its prompt is a part of the first."""

    def __init__(self, state: State, request: CompletionRequest) -> None:
        self._tokenizer = state.llm.tokenizer
        self._echo = request.echo
        self._offset = 0

    def feed(self, output: RequestOutput, sample: Completion) -> Record:
        text, token_ids, known = sample.text, sample.token_ids, sample.logprobs
        first = ""
        if self._echo:
            self._echo = False
            prompt = output.prompt_token_ids
            text = (self._tokenizer.decode(prompt, False) if output.prompt is None else output.prompt) + text
            if known is not None:
                first = self._tokenizer.token_to_piece(prompt[0])
                token_ids, known = [*prompt, *token_ids], [*(output.prompt_logprobs or [None]), *known]
        logprobs = None if known is None else text_logprobs(token_ids, known, self._offset, first)
        if logprobs is not None:
            self._offset += sum(map(len, logprobs["tokens"]))
        choice = text_choice(sample, logprobs)
        choice["text"] = text
        return choice
