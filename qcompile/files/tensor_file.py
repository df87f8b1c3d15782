"""What every kind of file offers: named tensors with known shapes, read one at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.errors import CheckpointError


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
        """The tensor, on the CPU, in memory of its own."""

    def bytes_at(self, start: int, count: int, name: str) -> Tensor:
        """Bytes of the file, copied: a mapped file would count as memory of the process as long as one tensor lives."""
        try:
            found = np.fromfile(self.path, np.uint8, count, offset=start)
        except OSError as error:
            raise CheckpointError(f"{self.path.name}: {name}: {error}") from error
        if found.size != count:
            raise CheckpointError(f"{self.path.name}: {name} has {found.size} bytes of {count}; is it truncated?")
        return torch.from_numpy(found) if count else torch.empty(0, dtype=torch.uint8)  # an empty array has stride 0
