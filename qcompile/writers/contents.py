"""What is to be written, and what every writer says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile.errors import UnsupportedError
from qcompile.files.write import write_json, write_shards
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor


@dataclass(frozen=True)
class ActivationRounding:
    """How the input or the output of a weight's module is rounded: an ActivationSpec, and what it is static by."""

    spec: str
    scale: Tensor | None = None
    zero: Tensor | None = None


@dataclass(frozen=True)
class Weight:
    """A quantized weight: the parameter's path, its numbers, what it is unpacked to, and its module's roundings.

    `transposed` says that the model's parameter is (…, in_features, out_features); the numbers never are. `kind` is
    what it belongs to: "linear", "head" (the linear behind the last layer), "embedding" (also one that is the head as
    well), or "other".
    """

    path: str
    tensor: QTensor
    dtype: torch.dtype
    transposed: bool = False
    input: ActivationRounding | None = None
    output: ActivationRounding | None = None
    kind: str = "linear"

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def spec(self) -> QSpec:
        return self.tensor.spec


@dataclass(frozen=True)
class CacheCodes:
    """How the keys and values of an attention module are cached: codes of `element` by the scales key and value, f32[1]
    or f32[heads, 1, 1]."""

    module: str
    element: str
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class Contents:
    """A model as it is to be written.

    config         its configuration, as in config.json
    weights        its quantized weights
    dense          its other tensors, each once
    dense_linears  the linear modules whose weight is among those
    caches         static scales of quantized key/value caches
    tokenizer      of transformers, or the .gguf file that has one, for formats that keep it in their file
    """

    config: Mapping[str, Any]
    weights: Sequence[Weight]
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    dense_linears: Sequence[str] = ()
    caches: Sequence[CacheCodes] = ()
    tokenizer: Any = None


class Writer(Protocol):
    """One format that checkpoints can be written in.

    scales              the dtype that scales have in it, None for any
    in_a_file           whether it is one file with the configuration and the tokenizer in it
    scaled_activations  whether its readers know activations that are divided by `scales`
    cache_scales        whether it can say how keys and values are cached
    """

    name: str
    scales: torch.dtype | None = None
    in_a_file: bool = False
    scaled_activations: bool = False
    cache_scales: bool = False

    def check(self, contents: Contents) -> None:
        """Raises UnsupportedError for a model that this format cannot say, however its weights are quantized."""
        if not contents.weights:
            raise UnsupportedError(f"the model has no quantized weights, which {self.name} is for; quantize it first")

    def refuses(self, weight: Weight) -> str | None:
        """Why this format cannot hold these numbers exactly, or None."""
        ...

    def nearest(self, weight: Weight) -> QSpec | None:
        """The spec to quantize a refused weight to: of those that the format holds, the one that loses least. None
        where the format can hold it as a float tensor only."""
        ...

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        """Write everything into an empty folder. Nothing is refused here."""
        ...


# By name, in the order of the file; each is made when it is written.
Tensors = dict[str, Callable[[], Tensor]]


def same(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def dense_tensors(contents: Contents) -> Tensors:
    """The tensors that every format stores as they are."""
    return {name: same(tensor) for name, tensor in contents.dense.items()}


def cache_tensors(contents: Contents) -> Tensors:
    """Scales of caches under the names that most readers know."""
    sides = ((cache.module, side, getattr(cache, side)) for cache in contents.caches for side in ("key", "value"))
    return {f"{module}.{side[0]}_scale": same(scale) for module, side, scale in sides}


def write_folder(
    contents: Contents, folder: Path, tensors: Tensors, quantization: Mapping[str, Any], largest_shard: int
) -> None:
    """A folder as transformers has them: the dense tensors, these, and a configuration that tells how to read them."""
    write_json(folder / "config.json", {**contents.config, "quantization_config": quantization})
    write_shards(folder, {**dense_tensors(contents), **tensors}, largest_shard, {})
