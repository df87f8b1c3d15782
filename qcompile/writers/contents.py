"""What is to be written, and what every writer says about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

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

    `transposed` says that the model's parameter is (…, in_features, out_features); the numbers never are.
    """

    path: str
    tensor: QTensor
    dtype: torch.dtype
    transposed: bool = False
    input: ActivationRounding | None = None
    output: ActivationRounding | None = None

    @property
    def module(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def spec(self) -> QSpec:
        return self.tensor.spec


@dataclass(frozen=True)
class Contents:
    """A model as it is to be written: its configuration, its quantized weights, and its other tensors, each once."""

    config: Mapping[str, Any]
    weights: Sequence[Weight]
    dense: Mapping[str, Tensor] = field(default_factory=dict)


class Writer(Protocol):
    """One format that checkpoints can be written in."""

    name: str

    def refuses(self, weight: Weight) -> str | None:
        """Why this format cannot hold these numbers exactly, or None."""
        ...

    def nearest(self, weight: Weight) -> QSpec:
        """The spec to quantize a refused weight to: of those that the format holds, the one that loses least."""
        ...

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        """Write everything into an empty folder. Nothing is refused here."""
        ...


Tensors = Mapping[str, Callable[[], Tensor]]


def dense_tensors(contents: Contents) -> dict[str, Callable[[], Tensor]]:
    """The tensors that every format stores as they are."""

    def same(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    return {name: same(tensor) for name, tensor in contents.dense.items()}
