"""dequantize on the CPU, in C++ (cpu/dequantize.h): the float weight behind packed codes, bit for bit the meaning's."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.ops.linear import dequantize
from qcompile.ops.registry import opaque


def refuses(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> str | None:
    """Why this kernel cannot write the weight, or None."""
    return packed.refuses(data, dtype, scale, zero, spec, shape[-1])


@opaque(dequantize.fake)
def dequantize_packed(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    out = data.new_empty(shape, dtype=dtype)
    if out.numel():
        data, scale = packed.with_dense_rows(data), packed.with_dense_rows(scale)
        zero = None if zero is None else packed.with_dense_rows(zero)
        reader = packed.Reader.of(spec, shape[-1])
        weight = reader.arguments(data, scale, zero)
        reader.dequantize(*weight, out.data_ptr(), packed.KINDS[dtype], packed.threads(out.numel()))
    return out


@dequantize.implementation("cpu", refuses)
def dequantize_cpu(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return dequantize_packed(data, scale, zero, spec, shape, dtype)
