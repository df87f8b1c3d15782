"""GGUF files: the header parsed here, tensors given as the bytes of their blocks.

The format, little-endian: "GGUF", version, number of tensors, number of metadata entries; the entries (key, type,
value); the tensors (name, dimensions with the fastest one first, type, offset); then, aligned, their data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). A file is not trusted: every count is held against the
bytes that are left before anything is made of it.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.tensor_file import TensorFile, TensorInfo

# The largest vocabularies known take a fifth of it.
LARGEST_HEADER = 100_000_000
LARGEST_NAME = 1 << 16
MOST_ENTRIES = 1 << 17

# Plain numbers, by their code in a file.
PLAIN: dict[int, torch.dtype] = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}
# Types of blocks, by their code: name, elements and bytes of a block.
BLOCKS: dict[int, tuple[str, int, int]] = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufFile(TensorFile):
    """One .gguf file, opened and checked; tensors are read when asked for.

    A tensor of blocks is uint8 (…, rows, bytes of a row), and its `TensorInfo.blocks` names their type. `metadata` has
    the entries that are numbers, strings and arrays of numbers; arrays of strings, which tokenizers have, are left out.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                if size < 24:
                    raise CheckpointError(f"{path.name}: {size} bytes are no GGUF file")
                with mmap.mmap(file.fileno(), min(size, LARGEST_HEADER), access=mmap.ACCESS_READ) as data:
                    header = _Header(path.name, data)
                    tensors, entries = header.start()
                    self.metadata: Mapping[str, Any] = header.metadata(entries)
                    infos = header.tensors(tensors)
                    end = header.at
        except OSError as error:
            raise CheckpointError(f"{path.name}: {error}") from error
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{path.name}: general.alignment is {alignment!r}, not a power of two")
        start = -(-end // alignment) * alignment
        self.tensors: dict[str, TensorInfo] = {}
        self._starts: dict[str, int] = {}
        for name, (shape, kind, offset) in infos.items():
            self.tensors[name] = _info(path, name, shape, kind)
            self._starts[name] = start + offset
            if offset % alignment:
                raise CheckpointError(f"{path.name}: {name} starts at {offset}, which {alignment} does not divide")
        self._check_places(size)

    def _check_places(self, size: int) -> None:
        reached, before = 0, ""
        for name, start in sorted(self._starts.items(), key=lambda item: item[1]):
            if start < reached:
                raise CheckpointError(f"{self.path.name}: {name} overlaps {before}")
            reached, before = start + self.tensors[name].nbytes, name
            if reached > size:
                raise CheckpointError(
                    f"{self.path.name}: {name} ends at byte {reached}, the file at {size}; is it truncated?"
                )

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        return self.bytes_at(self._starts[name], info.nbytes, name).view(info.dtype).reshape(info.shape)


def shards(path: Path) -> list[Path]:
    """All files of a model that is split into name-00001-of-0000N.gguf and so on, whichever of them is given."""
    if not (match := re.fullmatch(r"(.*)-\d{5}-of-(?!0{5})(\d{5})\.gguf", path.name)):
        return [path]
    stem, count = match[1], match[2]
    files = [path.with_name(f"{stem}-{number + 1:05}-of-{count}.gguf") for number in range(int(count))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{path.name} is one of {int(count)} files, and {file.name} is missing")
    return files


class _Header:
    """Walks over the header: `at` is the next byte."""

    def __init__(self, name: str, data: mmap.mmap):
        self.name = name
        self.data = data
        self.at = 0

    def start(self) -> tuple[int, int]:
        """How many tensors and metadata entries follow."""
        magic, version = self.take("4s"), self.take("I")
        if magic != b"GGUF":
            raise self.error(f"it starts with {magic!r}, not with b'GGUF'")
        if version not in (2, 3):
            older = "; convert it again with a newer llama.cpp" if version == 1 else ""
            order = ", big-endian" if version & 0xFFFF == 0 else ""
            raise self.error(f"GGUF version {version}{order}; 2 and 3 little-endian are read{older}")
        tensors, entries = self.take("Q"), self.take("Q")
        if max(tensors, entries) > MOST_ENTRIES:
            raise self.error(f"{tensors} tensors and {entries} metadata entries are more than any model has")
        return tensors, entries

    def metadata(self, count: int) -> dict[str, Any]:
        self.expect(count, 13, "metadata entries")
        found: dict[str, Any] = {}
        seen: set[str] = set()
        for _ in range(count):
            key = self.string("a metadata key", LARGEST_NAME)
            if not key or key in seen:
                raise self.error(f"metadata {key} occurs twice" if key else "a metadata key is empty")
            seen.add(key)
            if (value := self.value(key, self.take("I"))) is not None:
                found[key] = value
        return found

    def tensors(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Shape with the fastest dimension last, type and offset by name."""
        self.expect(count, 32, "tensors")
        found: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.string("a tensor's name", LARGEST_NAME)
            if name in found:
                raise self.error(f"tensor {name} occurs twice")
            dimensions = self.take("I")
            if not 1 <= dimensions <= 4:
                raise self.error(f"{name} has {dimensions} dimensions; a tensor has 1 to 4")
            shape = tuple(self.take("Q") for _ in range(dimensions))[::-1]
            if math.prod(shape) == 0 or math.prod(shape) >= 2**60:
                raise self.error(f"{name} is of shape {shape}")
            found[name] = (shape, self.take("I"), self.take("Q"))
        return found

    def value(self, key: str, kind: int) -> Any:
        """A metadata value; None for an array of strings."""
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY:
            if kind not in _NUMBERS:
                raise self.error(f"metadata {key} is of unknown type {kind}")
            return self.take(_NUMBERS[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind == _STRING:
            self.expect(count, 8, f"strings in {key}")
            self.skip_strings(key, count)
            return None
        if kind not in _NUMBERS:
            raise self.error(f"metadata {key} is an array of type {kind}; arrays of numbers or strings are read")
        dtype = np.dtype(_NUMBERS[kind]).newbyteorder("<")
        self.expect(count, dtype.itemsize, f"numbers in {key}")
        self.at += count * dtype.itemsize
        return np.frombuffer(self.data[self.at - count * dtype.itemsize : self.at], dtype)

    def skip_strings(self, key: str, count: int) -> None:
        # Vocabularies have a million of these, so this loop is kept bare.
        at, end, length_at = self.at, len(self.data), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end:
                raise self.error(f"it ends in {key}; is it truncated?")
            at += 8 + length_at(self.data, at)[0]
        if at > end:
            raise self.error(f"it ends in {key}; is it truncated?")
        self.at = at

    def string(self, what: str, longest: int = LARGEST_HEADER) -> str:
        length = self.take("Q")
        if length > longest:
            raise self.error(f"{what} of {length} bytes")
        self.expect(length, 1, f"bytes of {what}")
        self.at += length
        try:
            return self.data[self.at - length : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def take(self, letter: str) -> Any:
        layout = struct.Struct(f"<{letter}")
        if self.at + layout.size > len(self.data):
            raise self.error("it ends within its header; is it truncated?")
        self.at += layout.size
        return layout.unpack_from(self.data, self.at - layout.size)[0]

    def expect(self, count: int, smallest: int, what: str) -> None:
        """That so many things, of at least so many bytes each, can still follow."""
        if count * smallest > len(self.data) - self.at:
            raise self.error(f"{count} {what} do not fit into {len(self.data) - self.at} bytes; is it truncated?")

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {text}")


def _info(path: Path, name: str, shape: tuple[int, ...], kind: int) -> TensorInfo:
    if kind in PLAIN:
        return TensorInfo(PLAIN[kind], shape, path)
    if kind not in BLOCKS:
        known = ", ".join(block for block, _, _ in BLOCKS.values())
        raise CheckpointError(f"{path.name}: {name} is of unknown type {kind}; known: plain numbers, {known}")
    block, elements, size = BLOCKS[kind]
    if shape[-1] % elements:
        raise CheckpointError(f"{path.name}: {name} is {shape}; rows of {block} are multiples of {elements}")
    return TensorInfo(torch.uint8, (*shape[:-1], shape[-1] // elements * size), path, block)
