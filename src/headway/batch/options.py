"""What ``headway batch`` takes besides the engine's settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from headway.config.args import check_fields, setting
from headway.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """max_tokens, temperature, top_p, sampling: for rows whose sampling_params do not say."""

    input: str = field(metadata={"text": "rows; their columns go to the output too; - is stdin", "positional": True})
    output: str = field(metadata={"text": "the answered rows, in the input's order; - is stdout", "short": "-o"})
    task: Literal["generate", "embed", "classify", "score"] = setting("generate", text="what to do with a row")
    prompt_template: str | None = setting(
        text='a row\'s prompt from its columns, as in "Summarise: {text}" (default: rows bring prompt or messages)'
    )
    message_template: str | None = setting(text="the same, for what the user says to a chat model")
    max_tokens: int = setting(256, text="tokens an answer, at most", low=1)
    temperature: float = setting(0.0, text="0 always takes the most likely token", low=0.0)
    top_p: float = setting(1.0, text="sample from the most likely tokens that make up this probability", low=0.0)
    sampling: dict[str, Any] | None = setting(text='any sampling parameters, as in {"n": 2, "stop": ["###"]}')
    resume: bool = setting(False, text="go on where an earlier run of the same job ended, if one did")
    retry_failed: bool = setting(False, text="as --resume, and rows of the earlier output that failed run again")
    errors: str | None = setting(text="also write the rows that fail to this JSONL file")
    stop_on_error: bool = setting(False, text="end the job at the first row that fails")
    flush_interval_s: float = setting(1.0, text="how much work a killed job may lose", low=0.01)
    input_format: Literal["jsonl", "csv", "parquet", "arrow", "openai"] | None = setting(
        text="by default as the file's name says; openai: requests of a batch file"
    )
    output_format: Literal["jsonl", "csv", "parquet", "arrow", "openai"] | None = setting(
        text="by default as the file's name says; openai, for such requests: results of a batch file"
    )
    ray: str | None = setting(
        text="run on the Ray cluster of this address (local: one of this machine's); OUTPUT is a folder of files then"
    )
    id_column: str | None = setting(text="on Ray, for --resume: the column that tells rows apart")

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_ray()
        if self.prompt_template is not None and self.message_template is not None:
            raise ConfigError("message_template", self.message_template, "cannot be given beside prompt_template")

    def _check_ray(self) -> None:
        if self.ray is None:
            if self.id_column is not None:
                raise ConfigError("id_column", self.id_column, "is for --ray")
            return
        if self.resume != (self.id_column is not None):
            raise ConfigError("resume", self.resume, "on Ray, give --resume and --id-column together")
        for name in ("retry_failed", "errors"):
            if getattr(self, name):
                raise ConfigError(name, getattr(self, name), "is not for --ray")
