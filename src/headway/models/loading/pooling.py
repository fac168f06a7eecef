"""How a checkpoint declares its pooling: the files of a sentence-transformers directory. Knows no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from headway.errors import ModelError
from headway.models.loading.config import Config, is_gguf, read_json
from headway.models.spec import PoolingSpec

Pooling = Literal["mean", "cls", "max", "last"]

_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}


def read_pooling(path: Path, config: Config, *, default: Pooling) -> PoolingSpec:
    """Where nothing is declared: the default pooling, to unit length; softmax over labels; one label as it is."""
    modules: list[dict[str, Any]] | None = None if is_gguf(path) else read_json(path / "modules.json")
    pooling, normalize = default, True
    if modules is not None:
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        _check_modules(path, kinds)
        normalize = "Normalize" in kinds
        if "Pooling" in kinds:
            pooling = _mode(path / modules[kinds.index("Pooling")]["path"] / "config.json")
    return PoolingSpec(
        pooling=pooling, normalize=normalize, classify=_label_activation(config), score=_score_activation(config)
    )


def max_prompt(path: Path, positions: int) -> int:
    """The longest prompt: the position table, cut where a sentence-transformers directory says so."""
    declared = None if is_gguf(path) else read_json(path / "sentence_bert_config.json")
    return min(positions, (declared or {}).get("max_seq_length") or positions)


def _check_modules(path: Path, kinds: list[str]) -> None:
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        accepted = "Transformer, Pooling and Normalize"
        raise ModelError(f"{path / 'modules.json'}: module {', '.join(sorted(unknown))} is not among {accepted}")


def _mode(file: Path) -> Pooling:
    declared = read_json(file)
    if declared is None:
        raise ModelError(f"{file}: is missing, but modules.json names it")
    named = declared.get("pooling_mode")
    modes = [mode for key, mode in _MODES.items() if declared.get(key) or named == mode]
    if named == "lasttoken":
        modes.append("last")
    if len(modes) != 1:
        raise ModelError(f"{file}: declares {len(modes)} known pooling modes; must be one of {', '.join(_MODES)}")
    return modes[0]


def _label_activation(config: Config) -> Literal["softmax", "sigmoid", "identity"]:
    if config.get("problem_type") == "multi_label_classification":
        return "sigmoid"
    labels = len(config.get("id2label") or ()) or config.get("num_labels", 2)
    return "softmax" if labels > 1 else "identity"


def _score_activation(config: Config) -> Literal["sigmoid", "identity"]:
    """Cross-encoders name their function by its class; a sigmoid where they name none."""
    nested: Config = config.get("sentence_transformers") or {}
    name = nested.get("activation_fn") or config.get("sbert_ce_default_activation_function") or "Sigmoid"
    return "identity" if name.endswith("Identity") else "sigmoid"
