"""Weights of a GGUF file, dequantised tensor by tensor, under Hugging Face's names and in its layouts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from headway.errors import ModelError
from headway.gguf import GGUFFile, GGUFTensor
from headway.models.loading.config import Config

if TYPE_CHECKING:
    from headway.ops.port import Ops

_FLOATS = {"F32": np.float32, "F16": np.float16}
# Blocks dequantised at a time: they stay in cache until they are rounded to the compute type.
_CHUNK = 1 << 12
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


class GGUFWeights:
    """The gguf package supplies names, and dequantisation where ``ops`` has none; it is imported here, when needed."""

    def __init__(self, path: Path, config: Config, dtype: torch.dtype, ops: Ops) -> None:
        import gguf
        import gguf.quants

        self._gguf: Any = gguf
        self._file = GGUFFile(path)
        self._config, self._dtype, self._ops = config, dtype, ops
        self._threads = ThreadPoolExecutor(torch.get_num_threads())
        self._llama = config["model_type"] == "llama"
        arch = self._gguf.MODEL_ARCH[config["model_type"].upper()]
        layers = config.get("num_hidden_layers") or config["n_layer"]
        self._names: Any = self._gguf.get_tensor_name_map(arch, layers)

    def has(self, name: str) -> bool:
        return self._own_name(name) in self._file.tensors

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        own = self._own_name(name)
        tensor = self._file.tensors.get(own or "")
        if tensor is None:
            raise ModelError(f"{self._file.path}: tensor {own or name} is missing")
        weight = self._dequantised(tensor)
        if name.endswith(_CONV1D):
            weight = weight.T
        if tuple(weight.shape) != shape:
            found = tuple(weight.shape)
            raise ModelError(f"{self._file.path}: tensor {own} has shape {found}; its metadata asks for {shape}")
        if self._llama and name.split(".")[-2] in ("q_proj", "k_proj"):
            weight = self._halves(weight, name.split(".")[-2])
        return weight

    def _own_name(self, name: str) -> str | None:
        return self._names.get_name(name, try_suffixes=(".weight", ".bias"))

    def _dequantised(self, tensor: GGUFTensor) -> Tensor:
        raw = np.frombuffer(self._file.data, np.uint8, tensor.nbytes, tensor.offset)
        if tensor.type_name == "BF16":
            return torch.from_numpy(raw.view(np.int16).reshape(tensor.shape).copy()).view(torch.bfloat16)
        if tensor.type_name in _FLOATS:
            return torch.from_numpy(raw.view(_FLOATS[tensor.type_name]).reshape(tensor.shape).copy())
        out = torch.empty(tensor.num_elements, dtype=self._dtype)
        if self._ops.dequantise(tensor.type_name, raw, out):
            return out.view(tensor.shape)
        block_size, block_bytes = self._gguf.GGML_QUANT_SIZES[tensor.type_id]

        def dequantise(block: int) -> None:
            part = raw[block * block_bytes : (block + _CHUNK) * block_bytes]
            floats = torch.from_numpy(self._gguf.quants.dequantize(part, kind))
            out[block * block_size : (block + _CHUNK) * block_size] = floats

        kind = self._gguf.GGMLQuantizationType(tensor.type_id)
        try:
            list(self._threads.map(dequantise, range(0, len(raw) // block_bytes, _CHUNK)))
        except NotImplementedError as error:
            where = f"{self._file.path}: tensor {tensor.name}"
            raise ModelError(f"{where}: the gguf package cannot read {tensor.type_name}") from error
        return out.view(tensor.shape)

    def _halves(self, weight: Tensor, part: str) -> Tensor:
        """GGUF interleaves each head's rotated pairs; Hugging Face keeps the two halves apart."""
        key = "num_key_value_heads" if part == "k_proj" else "num_attention_heads"
        heads = self._config.get(key) or self._config["num_attention_heads"]
        return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
