"""linear on the CPU, in C++ of our own (kernels/cpu). The number of rows, known only at the call, decides how.

A few rows are bound by reading the weight: each code is read once, unpacked in registers and multiplied by all of them
(few_rows). More rows share tiles of the weight that are dequantized into the cache (many_rows). Where there are no
vectors of 512 bits for that, or torch has matrix instructions that we have not, slabs of a float copy go to torch.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels._cpp import processor_features
from qcompile.kernels.dequantize_cpu import dequantize_packed
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.ops.registry import opaque

# The most rows that few_rows takes. ms of one thread, torch's linear | few_rows | many_rows, 4096 × 2048, Zen 4:
#               4 rows               8 rows               12 rows              16 rows
# u4 bfloat16   1.36 | 0.72 | 1.08   1.75 | 1.26 | 1.42   2.10 | 1.83 | 1.80   2.39 | 2.38 | 2.12
# u8 bfloat16   1.52 | 0.90 | 1.28   1.83 | 1.70 | 1.76   2.14 | 2.51 | 2.06   2.61 | 3.37 | 2.49
# u4 float32    3.64 | 1.13 | 1.85   4.50 | 2.85 | 2.47   5.32 | 4.24 | 3.20   5.87 | 5.62 | 3.58
# u8 float32    4.09 | 1.28 | 2.11   5.07 | 3.14 | 2.66   5.73 | 4.54 | 3.45   6.11 | 5.97 | 3.86
FEW_ROWS = {torch.bfloat16: 8, torch.float32: 4, torch.float16: 4}
# The most rows that do without the copy: with our many_rows, the same beside AMX, and without many_rows (the last from
# 6.0 | 4.6 ms for 16 rows of bfloat16 and 6.0 | 21 of float32, AVX2 code on Zen 4). AMX is an estimate: torch's linear
# took 10.6 ms for 64 rows and 47.6 for 512, 16384 × 2048 on a Xeon with AMX, where AVX512 cannot beat 100 for 512.
ALL_ROWS = 1 << 62
ROWS_BESIDE_AMX = 64
ROWS_WITHOUT_MANY_ROWS = 16
SLAB_BYTES = 16 << 20  # malloc keeps pieces of this size, and larger ones are page faults every time


def refuses(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> str | None:
    """Why this kernel cannot run the call, or None."""
    if activation is not None and activation not in ACTIVATIONS:
        return f"does not know the activation {activation}"
    if bias is not None and bias.dtype not in packed.FLOATS:
        return f"bias is {bias.dtype}; float32, bfloat16 and float16 are handled"
    return packed.refuses(x, x.dtype, scale, zero, spec, x.shape[-1])


def _fake(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


@opaque(_fake)
def linear_packed(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str
) -> Tensor:
    columns, outputs = x.shape[-1], data.shape[0]
    y = x.new_empty((*x.shape[:-1], outputs))
    if y.numel() == 0:
        return y
    flat = packed.with_dense_rows(x if x.dim() == 2 else x.reshape(-1, columns))
    data, scale = packed.with_dense_rows(data), packed.with_dense_rows(scale)
    if zero is not None:
        zero = packed.with_dense_rows(zero)
    if bias is not None:
        bias = bias.contiguous()
    rows, reader, kind = flat.shape[0], packed.Reader.of(spec, columns), packed.KINDS[x.dtype]
    if rows > _rows_without_copy(x.dtype, reader.many_rows is not None):
        _multiply_copy(flat, data, scale, zero, bias, spec, y.view(rows, outputs))
        return y
    few = reader.many_rows is None or rows <= FEW_ROWS[x.dtype]
    (reader.few_rows if few else reader.many_rows)(
        *reader.arguments(data, scale, zero),
        flat.data_ptr(),
        rows,
        flat.stride(0),
        kind,
        y.data_ptr(),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else packed.KINDS[bias.dtype],
        packed.threads(rows * outputs * columns),
    )
    return y


@functools.cache
def _rows_without_copy(dtype: torch.dtype, has_many_rows: bool) -> int:
    if not has_many_rows:
        return ROWS_WITHOUT_MANY_ROWS
    return ROWS_BESIDE_AMX if dtype == torch.bfloat16 and "amx_bf16" in processor_features() else ALL_ROWS


def _multiply_copy(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, y: Tensor
) -> None:
    columns, outputs = x.shape[1], data.shape[0]
    slab = max(1, SLAB_BYTES // (columns * x.itemsize))
    for first in range(0, outputs, slab):
        count = min(slab, outputs - first)
        # One scale for the whole weight is not narrowed with it.
        sides = [side if side is None or side.shape[0] == 1 else side.narrow(0, first, count) for side in (scale, zero)]
        assert sides[0] is not None
        weight = dequantize_packed(data.narrow(0, first, count), sides[0], sides[1], spec, [count, columns], x.dtype)
        added = None if bias is None else bias.narrow(0, first, count).to(x.dtype)
        y.narrow(1, first, count).copy_(F.linear(x, weight, added))


@linear.implementation("cpu", refuses)
def linear_cpu(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> Tensor:
    # The activation is plain torch, for Inductor to fuse with what follows.
    y = linear_packed(x, data, scale, zero, bias, spec)
    return y if activation is None else ACTIVATIONS[activation](y)
