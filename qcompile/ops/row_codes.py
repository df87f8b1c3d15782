"""Rows as codes of 8 bits with a scale for each: what a quantized key/value cache holds."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ops.precision import wide
from qcompile.ops.registry import op, op_with_fake

# Elements, and the dtype of their codes: uint8 for the bits of float8_e4m3fn, which torch does not copy everywhere.
CODES = {"i8": torch.int8, "fp8_e4m3": torch.uint8}
SCALE = torch.float32
_LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}


def _empty(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=SCALE)


@op_with_fake(_empty)
def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes (…, n) of `dtype`, one of CODES, and scales (…) of x (…, n): the largest magnitude of a row by the largest
    number. A row is about number * scale. What is no number makes a scale that is none.
    """
    largest = wide(x).abs().amax(-1) / _LARGEST[dtype]
    scale = largest.clamp_min(torch.finfo(SCALE).smallest_normal).to(SCALE)
    return quantize_rows_by.meaning(x, scale, dtype), scale


@op
def quantize_rows_by(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (…, n) of `dtype`, one of CODES, of x (…, n) by scales (…) that are given. What lies beyond the largest
    code becomes that one."""
    largest = _LARGEST[dtype]
    y = wide(x) / wide(scale)[..., None]
    if dtype == torch.int8:
        return y.round().clamp(-largest - 1, largest).to(dtype)
    return y.clamp(-largest, largest).to(torch.float8_e4m3fn).view(dtype)


@op
def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that `quantize_rows` gave codes (…, n) and scales (…), rounded to `dtype`."""
    numbers = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    full = torch.promote_types(dtype, torch.float32)
    return (numbers.to(full) * scale.to(full)[..., None]).to(dtype)
