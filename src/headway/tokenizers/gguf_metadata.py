"""Reads the key-value part of a GGUF file; tensors are left alone.

The gguf library takes seconds here (a numpy view per string: 100k of them in a vocabulary), this takes milliseconds.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from headway.errors import ModelError

# Value type codes to struct formats; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """Every key with its value: int, float, bool, str or a list of them. ModelError if the file is not whole GGUF."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).metadata()
    except (OSError, ValueError, struct.error, KeyError, IndexError) as error:
        raise ModelError(f"{path}: not a readable GGUF file ({error})") from error


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def metadata(self) -> dict[str, Any]:
        if self._data[:4] != b"GGUF":
            raise ValueError(f"starts with {self._data[:4]!r}, not b'GGUF'")
        self._at = 4
        version, _tensors, count = self._unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version}, expected 2 or 3")
        return {self._string(): self._value(self._unpack("<I")[0]) for _ in range(count)}

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        end = self._at + length
        if end > len(self._data):
            raise ValueError("truncated")
        # Some converters cut tokens inside a character.
        text = self._data[self._at : end].decode("utf-8", errors="replace")
        self._at = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._unpack("<" + _SCALARS[kind])[0]
        item, length = self._unpack("<IQ")
        if length > len(self._data):
            raise ValueError("truncated")
        if item in _SCALARS:
            return list(self._unpack(f"<{length}{_SCALARS[item]}"))
        return [self._value(item) for _ in range(length)]
