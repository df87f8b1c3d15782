"""What the Triton kernels share that read or write a quantized cache: rows of codes, with a scale for each."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels._tiles import INTERPRET, constexpr
from qcompile.ops.registry import known
from qcompile.ops.row_codes import CODES, SCALE

SMALLEST = constexpr(torch.finfo(SCALE).smallest_normal)  # of scales


def refuses_codes(codes: Tensor, scale: Tensor) -> str | None:
    """Why no kernel takes these codes of rows and their scales, or None."""
    if codes.dtype not in CODES.values() or scale.dtype != SCALE:
        return f"handles codes of int8 or uint8 with scales of float32, not {codes.dtype} and {scale.dtype}"
    if codes.dtype == torch.uint8 and not INTERPRET and torch.cuda.get_device_capability(codes.device) < (8, 9):
        return "fp8 needs a GPU of compute capability 8.9"
    if known(codes.stride(-1)) != 1 or known(scale.stride(-1)) != 1:
        return "the columns of codes, or the scales of a head, are not neighbours"
    return None
