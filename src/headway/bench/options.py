"""What the benchmarks take besides the engine's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headway.config.args import check_fields, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputOptions:
    mode: Literal["generate", "classify", "embed"] = setting("generate", text="what is asked of the model")
    input_len: int = setting(64, text="tokens a prompt", low=1)
    output_len: int = setting(64, text="tokens an answer", low=1)
    num_prompts: int = setting(64, text="prompts, all given at once", low=1)
    repeats: int = setting(3, text="times the workload runs; medians are reported", low=1)
    seed: int = setting(0, text="of the random prompts", low=0)
    json: str | None = setting(text="write the report to this file too")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyOptions:
    input_len: int = setting(32, text="tokens a prompt", low=1)
    output_len: int = setting(128, text="tokens an answer", low=2)
    num_prompts: int = setting(8, text="requests, one after the other", low=1)
    seed: int = setting(0, text="of the random prompts", low=0)
    json: str | None = setting(text="write the report to this file too")

    def __post_init__(self) -> None:
        check_fields(self)
