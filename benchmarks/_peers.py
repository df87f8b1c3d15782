"""Linears of others at 4 and 8 bits, as far as they are installed, with random weights; the first is bf16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
DENSE = "bf16, cuBLAS"


@dataclass(frozen=True)
class Kind:
    """make(n, k) is a linear of an (n, k) weight, which takes `bits` for each of its numbers; it is timed for so many
    rows at most, and not at the shapes that it is too slow to prepare for."""

    name: str
    make: Callable[[int, int], Linear]
    bits: float
    most_rows: int = 1 << 30
    most_outputs: int = 1 << 30

    def nbytes(self, n: int, k: int) -> int:
        return int(n * k * self.bits / 8)

    def takes(self, n: int, rows: int) -> bool:
        return rows <= self.most_rows and n <= self.most_outputs


def peers() -> list[Kind]:
    found = [
        Kind(DENSE, _dense, 16),
        # More rows take 20 times as long as bf16, and the time of a whole run.
        Kind("torchao int4 g128", _aten_int4, 4 + 32 / 128, most_rows=64),
        Kind("torchao int8", _compiled_int8, 8, most_rows=1),
    ]
    if find_spec("gemlite"):
        # It has no tile for an output layer, and would search for one for minutes.
        found.append(Kind("gemlite u4 g64", _gemlite, 4 + 32 / 64, most_outputs=1 << 15))
    return found


def _dense(n: int, k: int) -> Linear:
    weight = torch.randn(n, k, dtype=torch.bfloat16, device="cuda")
    return lambda x: F.linear(x, weight)


def _aten_int4(n: int, k: int, group: int = 128) -> Linear:
    """What torchao's Int4WeightOnlyConfig lowers to where weights are packed in tiles of four dimensions."""
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    sides = torch.rand(k // group, n, 2, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, sides)


def _compiled_int8(n: int, k: int) -> Linear:
    """What torchao's Int8WeightOnlyConfig is in a compiled graph."""
    codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    scale = torch.rand(n, dtype=torch.bfloat16, device="cuda")
    return lambda x: _int8_mm(x, codes, scale)


@torch.compile(dynamic=False, fullgraph=True)
def _int8_mm(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return torch.mm(x, codes.to(x.dtype).t()) * scale


def _gemlite(n: int, k: int, group: int = 64) -> Linear:
    from gemlite.helper import A16Wn  # type: ignore[import-not-found]

    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scale = torch.rand(n * k // group, 1, device="cuda").bfloat16()
    return A16Wn(device="cuda", dtype=torch.bfloat16).from_weights(codes, scale, scale + 7.5, 4, group)
