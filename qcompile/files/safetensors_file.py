"""Safetensors files.

The format: a little-endian u64 with the header's length, the header as JSON, then the data that the header's offsets
speak of, without gaps (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.tensor_file import TensorFile, TensorInfo

# The package's own limit.
LARGEST_HEADER = 100_000_000

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class SafetensorsFile(TensorFile):
    """One .safetensors file, opened and checked; tensors are read when asked for."""

    def __init__(self, path: Path):
        self.path = path
        header, self._data = _header(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        if not isinstance(self.metadata, dict) or not all(isinstance(v, str) for v in self.metadata.values()):
            raise CheckpointError(f"{path.name}: __metadata__ is not a mapping of strings")
        self.tensors: dict[str, TensorInfo] = {name: _info(path, name, entry) for name, entry in header.items()}
        _check_offsets(path, header, path.stat().st_size - self._data)
        self._starts = {name: entry["data_offsets"][0] for name, entry in header.items()}

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        return self.bytes_at(self._data + self._starts[name], info.nbytes, name).view(info.dtype).reshape(info.shape)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise CheckpointError(f"{path.name}: {size} bytes cannot hold a header of {length}; is it truncated?")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: the header is not JSON with unique keys: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: the header is a {type(header).__name__}, not a mapping")
    return header, 8 + length


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{double!r} occurs twice")
    return found


def _info(path: Path, name: str, entry: Any) -> TensorInfo:
    where = f"{path.name}: {name}"
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: an entry has dtype, shape and data_offsets, not {str(entry)[:80]}")
    if (dtype := DTYPES.get(str(entry["dtype"]))) is None:
        raise CheckpointError(f"{where}: unknown dtype {entry['dtype']!r}; known: {', '.join(DTYPES)}")
    for key in ("shape", "data_offsets"):
        numbers = entry[key]
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointError(f"{where}: {key} is {str(numbers)[:80]}, not a list of counts")
    if len(entry["data_offsets"]) != 2:
        raise CheckpointError(f"{where}: data_offsets is {entry['data_offsets']}, not a start and an end")
    start, end = entry["data_offsets"]
    if end - start != (needs := math.prod(entry["shape"]) * dtype.itemsize):
        raise CheckpointError(
            f"{where}: {end - start} bytes; {entry['dtype']} of {tuple(entry['shape'])} needs {needs}"
        )
    return TensorInfo(dtype, tuple(entry["shape"]), path)


def _check_offsets(path: Path, header: Mapping[str, Any], size: int) -> None:
    reached = 0
    for name, (start, end) in sorted(((n, e["data_offsets"]) for n, e in header.items()), key=lambda item: item[1]):
        if start != reached:
            raise CheckpointError(f"{path.name}: {name} starts at byte {start}, the one before ends at {reached}")
        reached = end
    if reached != size:
        raise CheckpointError(f"{path.name}: the tensors end at byte {reached} of {size}; is it truncated?")
