"""Counters that the front end shows."""

from __future__ import annotations

import msgspec


class EngineStats(msgspec.Struct, kw_only=True):
    """running, waiting: requests now. blocks: KV blocks referenced now, and all there are. The rest counts since start.

    prefix_hit_tokens: prompt tokens found in the prefix cache at first admission, of prompt_tokens. steps: plans made.
    """

    running: int = 0
    waiting: int = 0
    blocks_used: int = 0
    blocks_total: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
