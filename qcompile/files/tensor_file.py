"""What every kind of file offers: named tensors with known shapes, read one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that has not been read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(ABC):
    """A file whose header has been read and checked. Raises CheckpointError, naming file and tensor, for what is wrong
    with it."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory of its own or mapped from the file."""
