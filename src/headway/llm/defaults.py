"""The sampling defaults a checkpoint brings: generation_config.json. GGUF files bring none."""

from __future__ import annotations

from pathlib import Path

from headway.errors import ModelError, RequestError
from headway.messages import SamplingParams
from headway.models.loading.config import is_gguf, read_json

_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def default_sampling(path: Path) -> SamplingParams:
    """For callers that pass no SamplingParams. ModelError when the file says what no request may."""
    file = path / "generation_config.json"
    declared = None if is_gguf(path) else read_json(file)
    if not isinstance(declared, dict):
        return SamplingParams()
    given = {ours: declared[theirs] for theirs, ours in _KEYS.items() if declared.get(theirs) is not None}
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise ModelError(f"{file}: {error}") from error
