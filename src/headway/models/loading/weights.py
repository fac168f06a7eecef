"""Where weights come from: one tensor at a time, memory-mapped until used."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from headway.errors import ModelError
from headway.models.loading.config import Config, is_gguf
from headway.models.loading.safetensors_file import StoredTensor, read_header, read_headers

if TYPE_CHECKING:
    from headway.ops.port import Ops


class WeightSource(Protocol):
    """A checkpoint's tensors under Hugging Face's names."""

    def has(self, name: str) -> bool: ...

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor, possibly memory-mapped. Raises ModelError when it is missing or has another shape."""
        ...


def open_weights(
    path: Path, config: Config, ops: Ops, *, load_format: str, seed: int, dtype: torch.dtype
) -> WeightSource:
    """The weights of a directory, a .safetensors or a GGUF file, which ``ops`` dequantises to ``dtype``; random ones in
    ``dtype`` for load_format "dummy"."""
    if load_format == "dummy":
        return DummyWeights(seed, dtype)
    if path.suffix == ".safetensors":
        return SafetensorsWeights(path.parent, read_header(path))
    if is_gguf(path):
        from headway.models.loading.gguf_weights import GGUFWeights

        return GGUFWeights(path, config, dtype, ops)
    headers = read_headers(path)
    if headers:
        return SafetensorsWeights(path, headers)
    pickled = path / "pytorch_model.bin"
    if pickled.exists():
        return PickledWeights(pickled)
    raise ModelError(f"{path}: has neither model.safetensors (nor its index) nor pytorch_model.bin")


class SafetensorsWeights:
    """One file or several, each opened when first used."""

    def __init__(self, directory: Path, headers: dict[str, StoredTensor]) -> None:
        self._directory, self._headers = directory, headers
        self._open: dict[Path, Any] = {}

    def has(self, name: str) -> bool:
        return _stored_name(name, self._headers) is not None

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = _stored_name(name, self._headers)
        if stored is None:
            raise _missing(self._directory, name)
        file = self._headers[stored].file
        return _checked(self._file(file).get_tensor(stored), shape, file, name)

    def _file(self, file: Path) -> Any:
        if file not in self._open:
            from safetensors import safe_open

            try:
                self._open[file] = safe_open(file, framework="pt")
            except Exception as error:  # safetensors has its own exception type
                raise ModelError(f"{file}: {error}") from error
        return self._open[file]


class PickledWeights:
    """pytorch_model.bin, read without executing anything in it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            self._tensors: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # a corrupt archive raises anything from EOFError to UnpicklingError
            raise ModelError(f"{file}: truncated, corrupt or not plain weights ({error})") from error

    def has(self, name: str) -> bool:
        return _stored_name(name, self._tensors) is not None

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        stored = _stored_name(name, self._tensors)
        if stored is None:
            raise _missing(self._file, name)
        return _checked(self._tensors[stored], shape, self._file, name)


class StreamedWeights:
    """Tensors that come in any order, each used once. Held are those that came before they were asked for.

    wanted: the names of all that will be asked for. Any of the prefixes, or none, means the same.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], wanted: Iterable[str], prefixes: Sequence[str]) -> None:
        self._coming = iter(tensors)
        self._prefixes = prefixes
        self._wanted = set(map(self._bare, wanted))
        self._held: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        return self._bare(name) in self._wanted

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        bare = self._bare(name)
        while bare not in self._held:
            came, tensor = next(self._coming, (None, None))
            if came is None or tensor is None:
                raise ModelError(f"tensor {name} is not among the weights")
            if self.has(came):
                self._held[self._bare(came)] = tensor.detach()
        self._wanted.discard(bare)
        return _checked(self._held.pop(bare).cpu(), shape, Path("weights"), name)

    def _bare(self, name: str) -> str:
        return name.removeprefix(next((prefix for prefix in self._prefixes if name.startswith(prefix)), ""))

    def exhaust(self) -> None:
        """Takes what nobody needs, for a source whose other ranks do."""
        self._held.clear()
        for _ in self._coming:
            pass


class DummyWeights:
    """Random weights: the same for the same name and seed, whatever is loaded before them and on whichever rank.

    Every matrix is cut from one stretch of normal numbers, repeated: copying is some 20 times faster than drawing.
    """

    _LENGTH = 1_048_573  # a prime: rows of one matrix start at different places
    _SCALE = 0.02

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._values = (torch.randn(self._LENGTH, generator=generator) * self._SCALE).to(dtype)

    def has(self, name: str) -> bool:
        return True

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
        count = math.prod(shape)
        start = zlib.crc32(name.encode()) % self._LENGTH
        return self._values.roll(-start).repeat(-(-count // self._LENGTH))[:count].view(shape)


def _stored_name(name: str, tensors: dict[str, Any]) -> str | None:
    """Checkpoints older than 2019 call a norm's weight and bias gamma and beta."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    return next((candidate for candidate in (name, old) if candidate in tensors), None)


def _missing(where: Path, name: str) -> ModelError:
    return ModelError(f"{where}: tensor {name} is missing")


def _checked(tensor: Tensor, shape: tuple[int, ...], where: Path, name: str) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ModelError(f"{where}: tensor {name} has shape {tuple(tensor.shape)}; its configuration asks for {shape}")
    if not tensor.is_floating_point():
        raise ModelError(f"{where}: tensor {name} has type {tensor.dtype}; must be a floating point type")
    return tensor
