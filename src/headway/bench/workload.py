"""Fixed random prompts, the same for every engine that is compared, and one pass over them."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from headway.engine import StepTimes
from headway.messages import PoolingParams, SamplingParams

if TYPE_CHECKING:
    from headway.llm import LLM

FIRST_ID, END_ID = 100, 40_000

Mode = Literal["generate", "classify", "embed"]


def random_prompts(input_len: int, num_prompts: int, seed: int, vocab_size: int = END_ID) -> list[list[int]]:
    rng = random.Random(seed)
    end = min(END_ID, vocab_size)
    return [[rng.randrange(FIRST_ID, end) for _ in range(input_len)] for _ in range(num_prompts)]


def sampling(output_len: int) -> dict[str, Any]:
    """Greedy, and exactly that many tokens."""
    return {"temperature": 0.0, "max_tokens": output_len, "ignore_eos": True}


class Pass(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass took. tokens: generated ones. times: where its steps' time went."""

    elapsed_s: float
    tokens: int
    times: StepTimes


def run_pass(llm: LLM, mode: Mode, prompts: list[list[int]], output_len: int) -> Pass:
    before = llm.metrics().times
    start = time.perf_counter()
    if mode == "generate":
        outputs = llm.generate(prompts, SamplingParams(**sampling(output_len)))
        tokens = sum(len(out.outputs[0].token_ids) for out in outputs)
    else:
        pool, tokens = llm.classify if mode == "classify" else llm.embed, 0
        pool(prompts, PoolingParams(task=mode))
    elapsed_s = time.perf_counter() - start
    return Pass(elapsed_s=elapsed_s, tokens=tokens, times=llm.metrics().times.since(before))
