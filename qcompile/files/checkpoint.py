"""A checkpoint: the files of a folder as one set of named tensors, and its configuration."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.gguf_file import GgufFile, shards
from qcompile.files.pickle_file import PickleFile
from qcompile.files.safetensors_file import SafetensorsFile
from qcompile.files.tensor_file import TensorFile, TensorInfo

# A configuration is text that people read; one larger than this is something else.
LARGEST_JSON = 64 << 20


class Checkpoint:
    """Named tensors of one or several files.

    folder    where it lies
    config    config.json; empty where there is none
    metadata  what the files' headers carry beside the tensors, together; strings, and numbers where the format has them
    tensors   every tensor's dtype, shape and file
    shapes    the shapes of the model's parameters, for formats that do not store them; empty while there is no model

    Raises CheckpointError for files that are missing, malformed, or hold one name twice.
    """

    def __init__(self, folder: Path, files: list[TensorFile]):
        self.folder = folder
        self.files = files
        self.config: dict[str, Any] = self.json("config.json") or {}
        self.metadata: dict[str, Any] = {}
        self.shapes: Mapping[str, tuple[int, ...]] = {}
        self._homes: dict[str, TensorFile] = {}
        for file in files:
            self.metadata.update(file.metadata)
            for name in file.tensors:
                if name in self._homes:
                    raise CheckpointError(f"{name} is in {self._homes[name].path.name} and in {file.path.name}")
                self._homes[name] = file

    @functools.cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By name."""
        return {name: file.tensors[name] for name, file in self._homes.items()}

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        if name not in self._homes:
            raise CheckpointError(f"{self.folder.name} has no tensor {name}")
        return self._homes[name].read(name)

    def modules(self, kind: str) -> list[str]:
        """The modules that have a tensor of this name: for "qweight" all X with a tensor X.qweight, in their order."""
        return [name.removesuffix(f".{kind}") for name in self._homes if name.endswith(f".{kind}")]

    def need(
        self, name: str, shape: int | tuple[int, ...] | None = None, dtypes: torch.dtype | Collection[torch.dtype] = ()
    ) -> TensorInfo:
        """What is known of a tensor that must be there, of this shape or number of dimensions and one of these dtypes.

        Raises CheckpointError, naming the tensor and what was expected.
        """
        if name not in self._homes:
            raise CheckpointError(f"{name} is missing")
        info = self._homes[name].tensors[name]
        if isinstance(shape, tuple) and info.shape != shape:
            raise CheckpointError(f"{name} is {info.shape}, not {shape}. Does the configuration belong to these files?")
        if isinstance(shape, int) and len(info.shape) != shape:
            raise CheckpointError(f"{name} is {info.shape}, which is not of {shape} dimensions")
        allowed = {dtypes} if isinstance(dtypes, torch.dtype) else dtypes
        if allowed and info.dtype not in allowed:
            known = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise CheckpointError(f"{name} is {str(info.dtype).removeprefix('torch.')}, not {known}")
        return info

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the folder; None if there is none. Raises CheckpointError if it is not a JSON object."""
        path = self.folder / name
        return _json(path) if path.is_file() else None

    @property
    def quantization(self) -> dict[str, Any]:
        """What the configuration says of the quantization; empty if it says nothing."""
        places = [self.config, self.config.get("text_config")]
        for place in places:
            for key in ("quantization_config", "compression_config"):
                if isinstance(place, dict) and isinstance(place.get(key), dict):
                    return place[key]
        for side in ("quantize_config.json", "quant_config.json"):
            if found := self.json(side):
                return found
        return {}


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder or in a .gguf file. Only headers are read. Raises CheckpointError, naming the file."""
    if path.suffix == ".gguf" and path.is_file():
        return Checkpoint(path.parent, [GgufFile(file) for file in shards(path)])
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a folder nor a .gguf file")
    return Checkpoint(path, [_OPENS[file.suffix](file) for file in _files(path)])


_OPENS: dict[str, Callable[[Path], TensorFile]] = {
    ".safetensors": SafetensorsFile,
    ".bin": PickleFile,
    ".pt": PickleFile,
}
# The usual names, the preferred one first.
_USUAL = ("model.safetensors", "pytorch_model.bin", "qmodel.pt")


def _files(folder: Path) -> list[Path]:
    """The files with the weights: those of a usual name, safetensors before pickles, else the only one of its kind."""
    for usual in _USUAL:
        if (folder / f"{usual}.index.json").is_file():
            return _indexed(folder / f"{usual}.index.json")
        if (folder / usual).is_file():
            return [folder / usual]
    for usual in _USUAL:
        suffix = Path(usual).suffix
        indices = [file for file in folder.glob(f"*{suffix}.index.json") if file.is_file()]
        if len(indices) == 1:
            return _indexed(indices[0])
        files = sorted(file for file in folder.glob(f"*{suffix}") if file.is_file() and file.name not in _TRAINING)
        if len(files) == 1 and not re.search(r"-\d{5}-of-\d{5}\.", files[0].name):
            return files
        if files:
            names = ", ".join(file.name for file in files[:8])
            raise CheckpointError(
                f"{folder} holds {len(files)} {suffix} files and no {usual}.index.json, which names those that belong "
                f"together: {names}"
            )
    raise CheckpointError(f"{folder} holds no .safetensors, .bin or .pt file")


# What trainers leave beside the weights.
_TRAINING = {"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"}


def _indexed(index: Path) -> list[Path]:
    """The files that the index names, each inside the folder. The files may be links that lead out of it, as all are
    in the hub's cache."""
    places = _json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index.name} has no weight_map from tensor to file")
    for shard in places.values():
        if not isinstance(shard, str) or Path(shard).name != shard or Path(shard).suffix not in _OPENS:
            name = repr(shard)[:80]
            raise CheckpointError(f"{index.name} names the file {name}, which is no file of weights in the folder")
        if not os.path.isfile(index.parent / shard):  # Path.is_file raises for names that are too long
            raise CheckpointError(f"{index.name} names {shard[:80]}, which is missing")
    return [index.parent / shard for shard in sorted(set(places.values()))]


def _json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if it is none."""
    if path.stat().st_size > LARGEST_JSON:
        raise CheckpointError(f"{path.name} has {path.stat().st_size} bytes, too many for a configuration")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} holds a {type(value).__name__}, not an object")
    return value
