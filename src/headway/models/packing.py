"""From a weight source to packed layers: rows merged, this rank's share cut out, each tensor dropped once packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headway.models.layers import DecoderLayer, DecoderWeights, EmbeddingTable, Norm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from headway.models.families.common import WeightMap
    from headway.models.loading.weights import WeightSource
    from headway.models.spec import DecoderSpec, Shard
    from headway.ops.port import Ops, PackedLinear


class Packer:
    """Packs single tensors, counts their bytes, and can put other values in their places."""

    def __init__(
        self,
        source: WeightSource,
        ops: Ops,
        dtype: torch.dtype,
        quantization: str | None,
        shard: Shard,
        prefixes: Sequence[str],
    ) -> None:
        """prefixes: which all names of a checkpoint but the heads' may have."""
        self.source, self.ops, self.dtype, self.quantization = source, ops, dtype, quantization
        self.shard, self.prefixes = shard, prefixes
        self.names_used: set[str] = set()
        self.nbytes = 0
        self._pieces: list[PackedLinear | Tensor] = []  # in the order of packing, which is always the same
        self._filling: Iterator[Any] | None = None

    def weights(self) -> object:
        raise NotImplementedError

    def refill(self, source: WeightSource) -> None:
        """Other weights of the same shapes, in the memory of those before."""
        self.source, self._filling = source, iter(self._pieces)
        with torch.no_grad():
            self.weights()
        self.release_source()

    def release_source(self) -> None:
        """Closes its files."""
        del self.source

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.names_used.add(name)
        return self.source.get(name, shape)

    def prefix_of(self, name: str) -> str:
        """The one that this checkpoint's tensor of that name has."""
        return next((prefix for prefix in self.prefixes if self.source.has(prefix + name)), self.prefixes[0])

    def tensors(self) -> list[Tensor]:
        """The memory that the weights take."""
        return [t for p in self._pieces for t in ([p] if isinstance(p, torch.Tensor) else p.tensors())]

    def linear(
        self, weight_NK: Tensor, bias_N: Tensor | None, *, gated: bool = False, quantize: bool = True
    ) -> PackedLinear:
        if self._filling is not None:
            packed: PackedLinear = next(self._filling)
            packed.fill(weight_NK, bias_N)
            return packed
        quantization = self.quantization if quantize else None
        self.nbytes += weight_NK.numel() * (1 if quantization == "int8" else self.dtype.itemsize)
        packed = self.ops.pack_linear(weight_NK, bias_N, dtype=self.dtype, quantization=quantization, gated=gated)
        self._pieces.append(packed)
        return packed

    def norm(self, name: str, size: int, eps: float, *, bias: bool) -> Norm:
        weight = self.vector(f"{name}.weight", size)
        return Norm(weight, self.vector(f"{name}.bias", size) if bias else None, eps)

    def vector(self, name: str, size: int) -> Tensor:
        return self.table(name, (size,), torch.float32)

    def table(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.copy(self.get(name, shape), dtype)

    def copy(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Its own, so that nothing keeps the file mapped."""
        if self._filling is not None:
            piece: Tensor = next(self._filling)
            return piece.copy_(tensor)
        copy = tensor.to(dtype, copy=True)
        self.nbytes += copy.nbytes
        self._pieces.append(copy)
        return copy

    def simple_linear(self, name: str, rows: int, columns: int, *, bias: bool, quantize: bool = True) -> PackedLinear:
        """A whole linear under one name."""
        weight = self.get(f"{name}.weight", (rows, columns))
        return self.linear(weight, self.get(f"{name}.bias", (rows,)) if bias else None, quantize=quantize)

    def inward_linear(self, name: str, weight_NK: Tensor, mine: slice, *, bias: bool) -> PackedLinear:
        """A linear whose inputs are split: the ranks' outputs add up, so the first rank alone has the bias."""
        mine_too = bias and self.shard.tensor_rank == 0
        return self.linear(weight_NK[:, mine], self.get(f"{name}.bias", (len(weight_NK),)) if mine_too else None)


class DecoderPacker(Packer):
    """One rank's DecoderWeights."""

    def __init__(
        self,
        spec: DecoderSpec,
        names: WeightMap,
        source: WeightSource,
        ops: Ops,
        dtype: torch.dtype,
        *,
        quantization: str | None,
        shard: Shard,
        with_head: bool,
    ) -> None:
        super().__init__(source, ops, dtype, quantization, shard, names.prefixes)
        self.spec, self.names, self.with_head = spec, names, with_head

    def weights(self) -> DecoderWeights:
        spec, shard, names = self.spec, self.shard, self.names
        self.prefix = self.prefix_of(f"{names.embed}.weight")
        layers = tuple(self._layer(i) for i in shard.layers(spec.num_layers))
        embed_size = spec.embed_size or spec.hidden_size
        projects = spec.embed_size is not None
        tied_head = self._head(embed_size) if self._needs_tied_head() else None
        return DecoderWeights(
            layers=layers,
            embed=(tied_head or EmbeddingTable(self._vocabulary(embed_size))) if shard.first else None,
            positions=self._positions() if spec.learned_positions and shard.first else None,
            project_in=self._projection(names.project_in, spec.hidden_size, embed_size)
            if projects and shard.first
            else None,
            project_out=self._projection(names.project_out, embed_size, spec.hidden_size)
            if projects and shard.last
            else None,
            final_norm=self._norm(self.prefix + names.final_norm) if spec.final_norm and shard.last else None,
            head=(tied_head or self._head(embed_size)) if self.with_head and shard.last else None,
            score=self.simple_linear(names.score, spec.num_labels, embed_size, bias=False, quantize=False)
            if spec.num_labels and shard.last
            else None,
            nbytes=self.nbytes,
        )

    def _needs_tied_head(self) -> bool:
        return self.with_head and self.spec.tie_embeddings and self.shard.first

    def _layer(self, index: int) -> DecoderLayer:
        spec, shard = self.spec, self.shard
        attention, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        if shard.halves_heads(spec):
            columns, o_rows = shard.qkv_columns(spec), rows_of(shard.width(attention))
            q_rows, k_rows, v_rows = (
                slice(max(columns.start - first, 0), max(columns.stop - first, 0))
                for first in (0, attention, attention + keys)
            )
        else:
            q_rows = o_rows = head_rows(shard.attended_heads(spec), spec.head_dim)
            k_rows = v_rows = head_rows(shard.cached_heads(spec), spec.head_dim)
        middle, part = spec.intermediate_size, rows_of(shard.width(spec.intermediate_size))
        qkv = [(attention, q_rows), (keys, k_rows), (keys, v_rows)]
        return DecoderLayer(
            attn_norm=self._norm(self._part(index, "attn_norm")[0]),
            qkv=self._merged(index, "qkv", qkv, bias=spec.qkv_bias),
            q_norm=self._head_norm(index, "q_norm"),
            k_norm=self._head_norm(index, "k_norm"),
            o=self._inward(index, "o", attention, o_rows, bias=spec.o_bias),
            mlp_norm=self._norm(self._part(index, "mlp_norm")[0]),
            gate_up=self._merged(index, "gate_up", [(middle, part)] * 2, bias=spec.mlp_bias) if spec.gated else None,
            up=None if spec.gated else self._merged(index, "up", [(middle, part)], bias=spec.mlp_bias),
            down=self._inward(index, "down", middle, part, bias=spec.mlp_bias),
        )

    def _part(self, index: int, part: str) -> list[str]:
        layer = self.prefix + self.names.layer.format(index)
        return [layer + name for name in self.names.parts[part]]

    def _norm(self, name: str) -> Norm:
        return self.norm(name, self.spec.hidden_size, self.spec.norm_eps, bias=self.spec.norm == "layer")

    def _head_norm(self, index: int, part: str) -> Norm | None:
        if not self.spec.qk_norm:
            return None
        return self.norm(self._part(index, part)[0], self.spec.head_dim, self.spec.norm_eps, bias=False)

    def _merged(self, index: int, part: str, sections: Sequence[tuple[int, slice]], *, bias: bool) -> PackedLinear:
        """Sections of rows (size, this rank's), stored under one name each or all under one."""
        names = self._part(index, part)
        columns = self.spec.hidden_size
        sizes = [size for size, _ in sections]
        if len(names) == len(sections):
            weights = [self._matrix(name, size, columns) for name, size in zip(names, sizes, strict=True)]
            biases = [self.get(f"{n}.bias", (s,)) for n, s in zip(names, sizes, strict=True)] if bias else []
        else:
            weights = list(self._matrix(names[0], sum(sizes), columns).split(sizes))
            biases = list(self.get(f"{names[0]}.bias", (sum(sizes),)).split(sizes)) if bias else []
        rows = [mine for _, mine in sections]
        return self.linear(_cut(weights, rows), _cut(biases, rows) if bias else None, gated=part == "gate_up")

    def _inward(self, index: int, part: str, columns: int, mine: slice, *, bias: bool) -> PackedLinear:
        (name,) = self._part(index, part)
        return self.inward_linear(name, self._matrix(name, self.spec.hidden_size, columns), mine, bias=bias)

    def _matrix(self, name: str, rows: int, columns: int) -> Tensor:
        if self.names.transposed:
            return self.get(f"{name}.weight", (columns, rows)).T
        return self.get(f"{name}.weight", (rows, columns))

    def _head(self, embed_size: int) -> PackedLinear:
        spec = self.spec
        name = self.prefix + self.names.embed if spec.tie_embeddings else self.names.head
        weight = self.get(f"{name}.weight", (spec.vocab_size, embed_size))
        return self.linear(self._vocabulary_rows(weight), None)

    def _vocabulary(self, embed_size: int) -> Tensor:
        weight = self.get(f"{self.prefix}{self.names.embed}.weight", (self.spec.vocab_size, embed_size))
        return self.copy(self._vocabulary_rows(weight), self.dtype)

    def _vocabulary_rows(self, weight_VK: Tensor) -> Tensor:
        return weight_VK[rows_of(self.shard.width(self.spec.vocab_size))]

    def _positions(self) -> Tensor:
        shape = (self.spec.learned_positions, self.spec.hidden_size)
        return self.table(f"{self.prefix}{self.names.positions}.weight", shape, torch.float32)

    def _projection(self, name: str, rows: int, columns: int) -> PackedLinear:
        return self.simple_linear(self.prefix + name, rows, columns, bias=False)


def rows_of(part: range) -> slice:
    return slice(part.start, part.stop)


def head_rows(heads: range, head_dim: int) -> slice:
    return slice(heads.start * head_dim, heads.stop * head_dim)


def _cut(sections: list[Tensor], rows: list[slice]) -> Tensor:
    mine = [section[part] for section, part in zip(sections, rows, strict=True)]
    return mine[0] if len(mine) == 1 else torch.cat(mine)
