"""The safetensors header, checked against the file's size. Knows no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.errors import ModelError

_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor is, and what. dtype: the format's name ("BF16", "F32", ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory's safetensors files. Empty when there are none; ModelError when one is not whole."""
    tensors: dict[str, StoredTensor] = {}
    for file in _files(directory):
        tensors.update(read_header(file))
    return tensors


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises ModelError when it is truncated or its header makes no sense."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise ModelError(f"{file}: truncated: its header should take {length} bytes, the file has {size}")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, entry) for name, entry in header.items()}
        end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: corrupt safetensors header ({error})") from error
    if end > size:
        last = max(header, key=lambda name: header[name]["data_offsets"][1])
        raise ModelError(f"{file}: truncated: tensor {last} ends at byte {end}, the file at {size}")
    return tensors


def _stored(file: Path, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    return StoredTensor(file, entry["dtype"], tuple(entry["shape"]), end - begin)


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if not index.exists():
        single = directory / "model.safetensors"
        return [single] if single.exists() else []
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index}: corrupt index ({error!r})") from error
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ModelError(f"{index}: names files that are not there: {', '.join(missing)}")
    return [directory / name for name in names]
