"""Who shares a scale. A weight is always seen as a matrix (rows, columns) = (out_features, in_features).

`scale_shape` says how many scales there are, `spread` gives each element its scale, and `fold` views a (rows, columns)
weight so that the elements of a group lie along one axis, which it returns too. Groups are in the order of the scales.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor, nn

from qcompile.errors import SpecError


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole weight: scale is (1, 1)."""

    def __str__(self) -> str:
        return "tensor"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (1, 1)

    def spread(self, scale: Tensor, rows: int, columns: int) -> Tensor:
        return scale

    def fold(self, weight: Tensor) -> tuple[Tensor, int]:
        return weight.reshape(1, -1), 1


@dataclass(frozen=True)
class PerRow:
    """One scale per output channel: scale is (rows, 1)."""

    def __str__(self) -> str:
        return "row"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (rows, 1)

    def spread(self, scale: Tensor, rows: int, columns: int) -> Tensor:
        return scale

    def fold(self, weight: Tensor) -> tuple[Tensor, int]:
        return weight, 1


@dataclass(frozen=True)
class PerGroup:
    """`size` neighbouring inputs of a row share a scale: scale is (rows, columns / size).

    Where `size` does not divide the columns but does divide the whole weight, groups run on over the row ends, as
    they do in HQQ: scale is (1, rows * columns / size).
    """

    size: int

    def __str__(self) -> str:
        return f"g{self.size}"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        if columns % self.size == 0:
            return (rows, columns // self.size)
        return (1, _flat_groups(self, rows, columns))

    def spread(self, scale: Tensor, rows: int, columns: int) -> Tensor:
        return scale.reshape(-1, 1).expand(-1, self.size).reshape(rows, columns)

    def fold(self, weight: Tensor) -> tuple[Tensor, int]:
        return weight.reshape(-1, self.size), 1


@dataclass(frozen=True)
class PerOutputGroup:
    """HQQ's axis 0: the flat weight is cut into `size` equal parts, and the elements at one place of every part share
    a scale, so element n of the flat weight belongs to group n mod (numel / size): scale is (1, numel / size)."""

    size: int

    def __str__(self) -> str:
        return f"o{self.size}"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (1, _flat_groups(self, rows, columns))

    def spread(self, scale: Tensor, rows: int, columns: int) -> Tensor:
        return scale.reshape(1, -1).expand(self.size, -1).reshape(rows, columns)

    def fold(self, weight: Tensor) -> tuple[Tensor, int]:
        return weight.reshape(self.size, -1), 0


@dataclass(frozen=True)
class PerBlock:
    """Tiles of `height` rows and `width` columns share a scale; the last ones may be cut off:
    scale is (ceil(rows / height), ceil(columns / width))."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"b{self.height}x{self.width}"

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return (-(-rows // self.height), -(-columns // self.width))

    def spread(self, scale: Tensor, rows: int, columns: int) -> Tensor:
        down, across = scale.shape
        height, width = min(self.height, rows), min(self.width, columns)  # a tile may be larger than the weight
        tiles = scale.reshape(down, 1, across, 1).expand(-1, height, -1, width)
        return tiles.reshape(down * height, across * width)[:rows, :columns]

    def fold(self, weight: Tensor) -> tuple[Tensor, int]:
        rows, columns = weight.shape
        down, across = self.scale_shape(rows, columns)
        # Repeated edges change no minimum, no maximum and no mean enough to matter: a cut tile holds its own values.
        padded = nn.functional.pad(
            weight[None, None], (0, across * self.width - columns, 0, down * self.height - rows), mode="replicate"
        )
        tiles = padded.reshape(down, self.height, across, self.width).transpose(1, 2)
        return tiles.reshape(down * across, -1), 1


Granularity = PerTensor | PerRow | PerGroup | PerOutputGroup | PerBlock


def parse_granularity(tag: str) -> Granularity:
    """`tensor`, `row`, `g64` (64 inputs), `o64` (64 parts along the output), `b128x128` (tiles)."""
    if tag == "tensor":
        return PerTensor()
    if tag == "row":
        return PerRow()
    if tile := re.fullmatch(r"b([1-9]\d{0,8})x([1-9]\d{0,8})", tag, re.ASCII):
        return PerBlock(int(tile[1]), int(tile[2]))
    kinds = {"g": PerGroup, "o": PerOutputGroup}
    if tag[:1] in kinds and len(tag) < 12 and tag[1:].isdecimal() and int(tag[1:]) > 0 and tag[1] != "0":
        return kinds[tag[0]](int(tag[1:]))
    known = "tensor, row, g<inputs> such as g64, o<outputs> such as o64, b<outputs>x<inputs> such as b128x128"
    raise SpecError(f"unknown granularity {tag!r}; known: {known}")


def _flat_groups(granularity: PerGroup | PerOutputGroup, rows: int, columns: int) -> int:
    numel = math.prod((rows, columns))
    if numel % granularity.size:
        raise SpecError(f"group size {granularity.size} does not divide a weight of ({rows}, {columns})")
    return numel // granularity.size
