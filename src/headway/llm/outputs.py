"""From engine outputs to what the caller gets: text, log probabilities, finish reasons, samples joined."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from headway.errors import EngineError
from headway.llm.processor import Prepared
from headway.llm.stops import StopStrings
from headway.messages import (
    Completion,
    EngineOutput,
    Logprob,
    PooledOutput,
    Request,
    RequestOutput,
    RowLogprobs,
    SamplingParams,
)
from headway.tokenizers import Tokenizer


class Sample:
    """One of a request's n samples; feed() gives what an engine output adds to it.

    whole: what it gave so far. finished: nothing is added any more. stopped_here: a stop string ended it, which the
    engine cannot know.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, index: int) -> None:
        assert request.sampling is not None
        self._tokenizer = tokenizer
        self._request = request
        self._params: SamplingParams = request.sampling
        self._index = index
        self._num_tokens = 0
        self._stream = None
        if request.stream:
            self._stream = tokenizer.stream(request.prompt_token_ids, self._params.skip_special_tokens)
            self._stops = StopStrings(self._params.stop_strings, self._params.include_stop_str_in_output)
        self.whole: Completion | None = None
        self.finished = False
        self.stopped_here = False

    def feed(self, output: EngineOutput) -> Completion:
        token_ids, reason = output.token_ids, output.finish_reason
        text, used, stop = self._text(token_ids, reason == "stop", reason is not None)
        self.stopped_here = stop is not None
        self.finished = self.stopped_here or reason is not None
        rows = None if output.logprobs is None else output.logprobs[:used]
        return Completion(
            index=self._index,
            text=text,
            token_ids=token_ids[:used] if used < len(token_ids) else token_ids,
            finish_reason="stop" if stop is not None else reason,
            stop_reason=stop if stop is not None else output.stop_reason,
            error=output.error,
            logprobs=None if rows is None else [decode_logprobs(self._tokenizer, row) for row in rows],
        )

    def _text(self, token_ids: Sequence[int], stopped: bool, last: bool) -> tuple[str, int, str | None]:
        """The new text, how many of the tokens it took, and the stop string that ended it."""
        shown = len(token_ids)
        if stopped and token_ids and token_ids[-1] in self._request.stop_token_ids:
            shown -= not self._params.include_stop_str_in_output
        if self._stream is None:
            prompt, skip = self._request.prompt_token_ids, self._params.skip_special_tokens
            return self._tokenizer.decode_after(prompt, token_ids[:shown], skip), len(token_ids), None
        text = ""
        for used, token in enumerate(token_ids[:shown], start=1):
            more, stop = self._push(self._stream.push(token))
            text += more
            if stop is not None:
                return text, used, stop
        if last:
            more, stop = self._push(self._stream.flush(), count=0)
            return text + more + self._stops.flush(), len(token_ids), stop
        return text, len(token_ids), None

    def _push(self, text: str, count: int = 1) -> tuple[str, str | None]:
        self._num_tokens += count
        # A stop string counts only once min_tokens are there.
        return self._stops.push(text) if self._num_tokens > self._params.min_tokens else (text, None)


class GeneratedResult:
    """Joins the engine outputs of one prompt's samples into RequestOutputs.

    feed() returns a delta for every engine output if the caller wants deltas, else the whole at the end.
    """

    def __init__(self, tokenizer: Tokenizer, prepared: Prepared) -> None:
        self._tokenizer = tokenizer
        self._prepared = prepared
        self._samples = {r.request_id: Sample(tokenizer, r, i) for i, r in enumerate(prepared.requests)}
        self._unfinished = len(self._samples)
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._num_cached_tokens = 0

    @property
    def finished(self) -> bool:
        return not self._unfinished

    def feed(self, output: EngineOutput) -> tuple[RequestOutput | None, bool]:
        """Also whether the engine must abort this request id: its text has ended, its tokens have not."""
        sample = self._samples[output.request_id]
        if sample.finished:
            return None, False
        completion = sample.feed(output)
        self._unfinished -= sample.finished
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        must_abort = sample.stopped_here and output.finish_reason is None
        if output.prompt_logprobs is not None and self._prompt_logprobs is None:  # all samples have the same
            known = (decode_logprobs(self._tokenizer, row) for row in output.prompt_logprobs)
            self._prompt_logprobs = [None, *known]
        if self._prepared.delta:
            known = None if output.prompt_logprobs is None else self._prompt_logprobs
            return self._output([completion], known), must_abort
        sample.whole = completion if sample.whole is None else _joined(sample.whole, completion)
        if not self.finished:
            return None, must_abort
        wholes = [sample.whole for sample in self._samples.values() if sample.whole is not None]
        return self._output(wholes, self._prompt_logprobs), must_abort

    def _output(
        self, completions: list[Completion], prompt_logprobs: list[dict[int, Logprob] | None] | None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self._prepared.request_id,
            prompt=self._prepared.prompt,
            prompt_token_ids=self._prepared.requests[0].prompt_token_ids,
            outputs=completions,
            finished=self.finished,
            num_cached_tokens=self._num_cached_tokens,
            prompt_logprobs=prompt_logprobs,
        )


class PooledResult:
    """One prompt's embedding, class probabilities or score."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self.finished = False

    def feed(self, output: EngineOutput) -> tuple[PooledOutput | None, bool]:
        self.finished = True
        if output.pooled is None:
            raise EngineError(f"request {output.request_id}: {output.error or output.finish_reason}")
        vector = PooledOutput(
            request_id=self._prepared.request_id,
            prompt_token_ids=self._prepared.requests[0].prompt_token_ids,
            data=array("f", output.pooled).tolist(),
            num_cached_tokens=output.num_cached_tokens,
        )
        return vector, False


Result = GeneratedResult | PooledResult


def make_result(tokenizer: Tokenizer, prepared: Prepared) -> Result:
    return GeneratedResult(tokenizer, prepared) if prepared.requests[0].sampling is not None else PooledResult(prepared)


def decode_logprobs(tokenizer: Tokenizer, row: RowLogprobs) -> dict[int, Logprob]:
    """The sampled (or prompt) token first, then the most likely ones by rank."""
    decoded = {
        token: Logprob(logprob=logprob, rank=rank, decoded_token=tokenizer.token_to_piece(token))
        for rank, (token, logprob) in enumerate(zip(row.token_ids[1:], row.logprobs[1:], strict=True), start=1)
    }
    token = row.token_ids[0]
    own = Logprob(logprob=row.logprobs[0], rank=row.rank, decoded_token=tokenizer.token_to_piece(token))
    return {token: own, **{t: logprob for t, logprob in decoded.items() if t != token}}


def _joined(whole: Completion, delta: Completion) -> Completion:
    whole.text += delta.text
    whole.token_ids.extend(delta.token_ids)
    if delta.logprobs is not None:
        whole.logprobs = whole.logprobs or []
        whole.logprobs.extend(delta.logprobs)
    whole.finish_reason, whole.stop_reason, whole.error = delta.finish_reason, delta.stop_reason, delta.error
    return whole
