"""Any decoder that transformers has, with our paged attention plugged in through its attention interface.

Needs the extra "hf". Linears stay transformers' own: this is for reach, not for speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from headway.errors import ConfigError, ModelError, RequestError
from headway.models import pooling
from headway.models.loading.pooling import read_pooling
from headway.ops.port import AttentionMetadata

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from headway.config.settings import ModelConfig
    from headway.messages import PoolingParams
    from headway.models.loading.config import Config
    from headway.models.spec import PoolingSpec, Shard
    from headway.ops.port import KVCache, Ops

_NAME = "headway_paged"

# Arguments of other attention variants; with any of them set, plain attention would be wrong.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "attention_chunk_size", "head_mask")


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    headway_step: tuple[Ops, KVCache, AttentionMetadata] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: [1, H, T, D], key, value: [1, G, T, D] -> [1, T, H, D]. The step comes as a keyword through the model."""
    extra = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if headway_step is None or extra or value.shape[-1] != query.shape[-1]:
        reason = ", ".join(extra) or "its own arguments or head sizes"
        raise ModelError(f"{type(module).__name__} uses attention with {reason}, which is not supported")
    ops, kv, meta = headway_step
    layer: int = module.layer_idx  # type: ignore[assignment]
    q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    ops.write_kv(kv, layer, k_TGD, v_TGD, meta.slot_mapping)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ops.attention(kv, layer, q_THD, meta, scale=scale, window=sliding_window)[None], None


AttentionInterface.register(_NAME, paged_attention)


class TransformersDecoder:
    """A CausalModel around a transformers model."""

    def __init__(
        self, language_model: Any, ops: Ops, dtype: torch.dtype, pooling_spec: PoolingSpec, max_positions: int
    ) -> None:
        config = language_model.config.get_text_config()
        self.ops, self.dtype, self.max_positions = ops, dtype, max_positions
        self.packer = None
        self.vocab_size, self.num_labels = int(config.vocab_size), 0
        self.weights_bytes = sum(p.nbytes for p in language_model.parameters())
        self._pooling_spec = pooling_spec
        self._layers = int(config.num_hidden_layers)
        self._kv_heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        self._head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._body: Any = language_model.base_model
        self._language_model = language_model
        # What is left of the language model is the step from hidden states to logits, soft caps and scales included.
        setattr(language_model, language_model.base_model_prefix, _GivenHiddenStates())

    def allocate_kv(self, num_blocks: int, block_size: int) -> KVCache:
        return self.ops.allocate_kv(self._layers, num_blocks, block_size, self._kv_heads, self._head_dim, self.dtype)

    def forward(self, token_ids_T: Tensor, meta: AttentionMetadata, kv: KVCache) -> Tensor:
        output = self._body(
            input_ids=token_ids_T.long()[None],
            position_ids=meta.positions.long()[None],
            use_cache=False,
            headway_step=(self.ops, kv, meta),
        )
        return output.last_hidden_state[0]

    def logits(self, hidden_RK: Tensor) -> Tensor:
        return self._language_model(inputs_embeds=hidden_RK[None], use_cache=False).logits[0].float()

    def pool(self, hidden_RK: Tensor, params: list[PoolingParams]) -> list[Tensor]:
        for asked in params:
            if asked.task != "embed":
                raise RequestError("task", asked.task, "this model has no classification head: only embed")
        return [pooling.embedding(row, p, self._pooling_spec) for row, p in zip(hidden_RK, params, strict=True)]


class _GivenHiddenStates(nn.Module):
    """Stands where the body was: its input is its output. Bodies are given theirs by position or by name."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


def load_with_transformers(
    config: ModelConfig, path: Path, checkpoint: Config, ops: Ops, shard: Shard, max_positions: int
) -> TransformersDecoder:
    """Raises ModelError where transformers does not have it either, or it cannot run on a paged cache."""
    for field in ("tensor", "pipeline"):
        if (size := getattr(shard, f"{field}_size")) > 1:
            raise ConfigError(f"{field}_parallel_size", size, "must be 1 for a model run by transformers")
    if config.quantization is not None:
        raise ConfigError("quantization", config.quantization, "must be none for a model run by transformers")
    dtype: torch.dtype = getattr(torch, config.dtype)
    language_model = _language_model(config, path, dtype)
    if not language_model._supports_attention_backend:
        raise ModelError(f"{path}: {type(language_model).__name__} does not take an attention function from outside")
    pooling_spec = read_pooling(path, checkpoint, default="last")
    model = TransformersDecoder(language_model, ops, dtype, pooling_spec, max_positions)
    _try(model, path)
    return model


def _language_model(config: ModelConfig, path: Path, dtype: torch.dtype) -> Any:
    trust = config.trust_remote_code
    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": _NAME, "trust_remote_code": trust}
    try:
        if config.load_format == "dummy":
            torch.manual_seed(config.seed)
            declared = AutoConfig.from_pretrained(path, trust_remote_code=trust)
            return AutoModelForCausalLM.from_config(declared, **settings).eval()
        return AutoModelForCausalLM.from_pretrained(path, local_files_only=True, **settings).eval()
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ModelError(f"{path}: transformers cannot load it: {error}") from error


def _try(model: TransformersDecoder, path: Path) -> None:
    """One token through the whole model, so that what is not supported shows at load and not in a request."""

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    meta = AttentionMetadata(int32(0, 1), int32(1), int32(1)[None], int32(0), int32(16), 1, 1)
    try:
        with torch.inference_mode():
            model.logits(model.forward(int32(0), meta, model.allocate_kv(2, 16)))
    except (TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise ModelError(f"{path}: cannot run on a paged cache: {error}") from error
