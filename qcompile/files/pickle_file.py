"""Files that torch.save wrote, such as pytorch_model.bin and HQQ's qmodel.pt, read without running anything in them.

The format: a zip archive of stored entries, `<root>/data.pkl` with a pickle of the names and `<root>/data/<key>` with
the bytes of each storage. The pickle is read by unpickle.py.

Nested mappings are flattened: tensors are named by the dotted path to them, and plain values go to `metadata`, as JSON
by their path. An object of torchao becomes what torchao's own safetensors files hold in its place: tensors
`P._weight_<attribute>` for the parameter `P.weight`, and in `metadata` under "P.weight" a JSON object with its class as
`_type`, its other attributes as `_data` and the names of its tensors as `_tensor_data_names`. Enum members are
`{"_type": class, "_data": name}`, with the value where only that is written.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.tensor_file import TensorFile, TensorInfo
from qcompile.files.unpickle import Global, Machine, Place, Record, short

LARGEST_PICKLE = 100_000_000
LONGEST_NAME = 1000
DEEPEST = 20


class PickleFile(TensorFile):
    """One file of torch.save, its pickle read and checked; tensors are read when asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._places: dict[str, Place] = {}
        try:
            self._spans, pickled = _unzip(path)
            root = Machine(pickled).run()
            if not isinstance(root, dict):
                raise CheckpointError(f"it holds {short(root)}, not a mapping from names to tensors")
            self._left = len(pickled)  # every entry takes a byte, unless entries are shared to make many of few
            self._flatten("", root)
        except (CheckpointError, *_MALFORMED) as error:
            raise CheckpointError(f"{path.name}: {error or type(error).__name__}") from error

    def read(self, name: str) -> Tensor:
        place = self._places[name]
        if 0 in place.size:
            return torch.empty(place.size, dtype=place.dtype)
        start = self._spans[place.storage][0] + place.offset * place.dtype.itemsize
        count = 1 + sum((size - 1) * step for size, step in zip(place.size, place.stride, strict=True))
        data = self.bytes_at(start, count * place.dtype.itemsize, name).view(place.dtype)
        return data.as_strided(place.size, place.stride).contiguous()

    def _flatten(self, path: str, value: Any, depth: int = 0) -> None:
        self._count(path, depth)
        if isinstance(value, dict):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise CheckpointError(f"{path or 'the root'} has the key {key!r}, not a name")
                self._flatten(f"{path}.{key}" if path else key, item, depth + 1)
        elif isinstance(value, Place):
            self._check(path, value)
            if path in self.tensors:
                raise CheckpointError(f"{path} is there twice")
            self.tensors[path] = TensorInfo(value.dtype, value.size, self.path)
            self._places[path] = value
        elif isinstance(value, Record) and value.wraps:
            owner, _, name = path.rpartition(".")
            plain, tensors = {}, {}
            for key, item in value.state.items():
                is_tensor = isinstance(item, Place) or (isinstance(item, Record) and item.wraps)
                (tensors if is_tensor else plain)[str(key)] = item
            kind = {"_type": value.kind.name, "_data": plain, "_tensor_data_names": list(tensors)}
            self.metadata[path] = json.dumps(self._plain(path, kind, depth + 1))
            for key, item in tensors.items():
                self._flatten(f"{owner}{'.' if owner else ''}_{name}_{key}", item, depth + 1)
        else:
            self.metadata[path] = json.dumps(self._plain(path, value, depth))

    def _plain(self, path: str, value: Any, depth: int) -> Any:
        """A value that holds no tensors, as JSON has it."""
        self._count(path, depth)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return [self._plain(path, item, depth + 1) for item in value]
        if isinstance(value, dict):
            return {str(key): self._plain(path, item, depth + 1) for key, item in value.items()}
        if isinstance(value, Global):
            if value.is_dtype:
                return {"_type": "torch.dtype", "_data": value.name}
            return {"_type": value.name}
        if isinstance(value, Record):
            inside = value.arguments[0] if len(value.arguments) == 1 else value.arguments or value.state
            return {"_type": value.kind.name, "_data": self._plain(path, inside, depth + 1)}
        return {"_type": type(value).__name__}

    def _count(self, path: str, depth: int) -> None:
        self._left -= 1
        if self._left < 0 or depth > DEEPEST or len(path) > LONGEST_NAME:
            raise CheckpointError(f"entries within entries without end, at {path[:80]!r}")

    def _check(self, name: str, place: Place) -> None:
        if place.storage not in self._spans:
            raise CheckpointError(f"{name}: its storage {place.storage!r} is missing")
        numbers = (*place.size, *place.stride, place.offset)
        if len(place.size) != len(place.stride) or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise CheckpointError(f"{name}: a size of {place.size} with a stride of {place.stride} is no tensor")
        holds = self._spans[place.storage][1] // place.dtype.itemsize
        last = place.offset + sum((size - 1) * step for size, step in zip(place.size, place.stride, strict=True))
        count = math.prod(place.size)
        if count and (last >= holds or count > holds):
            raise CheckpointError(
                f"{name}: {tuple(place.size)} with stride {tuple(place.stride)} at {place.offset} does not fit into "
                f"the {holds} elements of its storage; is the file truncated?"
            )


# What the machine, genops and zipfile raise for bytes that are no pickle and no archive.
_MALFORMED = (
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError, ArithmeticError, RecursionError),
    *(OSError, EOFError, NotImplementedError, zipfile.BadZipFile),
)


def _unzip(path: Path) -> tuple[dict[str, tuple[int, int]], bytes]:
    """Where each storage lies in the file, (start, bytes) by its key, and the pickle."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError("it is no zip archive, as torch.save writes them since 1.6; load and save it with torch")
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = archive.infolist()
        pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"the archive holds {len(pickles)} files data.pkl, not one")
        root = pickles[0].removesuffix("data.pkl")
        found: dict[str, tuple[int, int]] = {}
        for name, start, length in _spans(entries, file, path.stat().st_size):
            if name in found:
                raise CheckpointError(f"the archive holds {name} twice")
            found[name] = (start, length)
        if found.get(f"{root}byteorder"):
            _expect_little(_bytes(file, found[f"{root}byteorder"]))
        if found[pickles[0]][1] > LARGEST_PICKLE:
            raise CheckpointError(f"data.pkl has {found[pickles[0]][1]} bytes, too many for names of tensors")
        pickled = _bytes(file, found[pickles[0]])
    storages = f"{root}data/"
    return {name.removeprefix(storages): span for name, span in found.items() if name.startswith(storages)}, pickled


def _spans(entries: list[zipfile.ZipInfo], file: Any, size: int) -> Iterator[tuple[str, int, int]]:
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise CheckpointError(f"{entry.filename} is compressed or encrypted; torch.save stores it as it is")
        file.seek(entry.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\3\4":
            raise CheckpointError(f"{entry.filename} has no header of its own")
        start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        if start + entry.file_size > size:
            raise CheckpointError(f"{entry.filename} ends at byte {start + entry.file_size} of {size}")
        yield entry.filename, start, entry.file_size


def _bytes(file: Any, span: tuple[int, int]) -> bytes:
    file.seek(span[0])
    return file.read(span[1])


def _expect_little(order: bytes) -> None:
    if order != b"little":
        raise CheckpointError(f"its numbers are {order[:10]!r}-endian; only little-endian ones are read")
