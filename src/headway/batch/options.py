"""What ``headway batch`` takes besides the engine's settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from headway.config.args import check_fields, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """max_tokens, temperature, top_p: for rows whose sampling_params do not say."""

    input: str = field(metadata={"text": "JSONL rows with prompt or messages; - reads stdin", "positional": True})
    output: str = field(metadata={"text": "the answered rows, in the input's order; - is stdout", "short": "-o"})
    max_tokens: int = setting(256, text="tokens an answer, at most", low=1)
    temperature: float = setting(0.0, text="0 always takes the most likely token", low=0.0)
    top_p: float = setting(1.0, text="sample from the most likely tokens that make up this probability", low=0.0)

    def __post_init__(self) -> None:
        check_fields(self)
