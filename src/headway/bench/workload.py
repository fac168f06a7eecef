"""Fixed random prompts: the same for every engine that is compared."""

from __future__ import annotations

import random
from typing import Any

FIRST_ID, END_ID = 100, 40_000


def random_prompts(input_len: int, num_prompts: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(FIRST_ID, END_ID) for _ in range(input_len)] for _ in range(num_prompts)]


def sampling(output_len: int) -> dict[str, Any]:
    """Greedy, and exactly that many tokens."""
    return {"temperature": 0.0, "max_tokens": output_len, "ignore_eos": True}
