"""What every kind of file offers: named tensors with known shapes, read one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that has not been read. `blocks` names the type of its blocks where `dtype` is only their bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    blocks: str = ""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(ABC):
    """A file whose header has been read and checked. Raises CheckpointError, naming file and tensor, for what is wrong
    with it."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: Mapping[str, Any]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory of its own or mapped from the file."""
