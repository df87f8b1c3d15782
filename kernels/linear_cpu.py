"""linear on the CPU, in C++ of our own (kernels/cpu). The number of rows, known only at the call, decides how.

A few rows are bound by reading the weight: each code is read once, unpacked in registers and multiplied by all of them
(few_rows). More rows share tiles of the weight that are dequantized into the cache (many_rows). No float copy of the
weight is written to memory, except where the processor has no vectors of 512 bits and many rows go to torch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels.dequantize_cpu import dequantize_packed
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.ops.registry import opaque

# The most rows that few_rows takes. ms of one thread, few_rows | many_rows, 4096 × 2048, Zen 4:
#               4 rows          6 rows          8 rows          12 rows         16 rows
# u4 bfloat16   0.82 | 1.18     1.11 | 1.57     1.41 | 1.78     1.99 | 2.10     2.60 | 2.43
# i8 bfloat16   0.91 | 1.59     1.24 | 1.74     1.66 | 1.90     2.38 | 2.16     3.09 | 2.49
# u4 float32    1.21 | 2.45     2.52 | 2.58     3.15 | 2.89     4.51 | 3.47     6.05 | 3.99
# i8 float32    1.32 | 2.14     2.36 | 2.24     3.31 | 2.53     4.62 | 3.34     6.13 | 3.75
FEW_ROWS = {torch.bfloat16: 8, torch.float32: 5, torch.float16: 5}
# The same where the other way is a float copy of the weight.
FEW_ROWS_BEFORE_COPY = 16


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
    rows, reader = flat.shape[0], packed.Reader.of(spec, columns)
    many_rows = reader.many_rows
    if rows <= (FEW_ROWS_BEFORE_COPY if many_rows is None else FEW_ROWS[x.dtype]):
        function = reader.few_rows
    elif many_rows is not None:
        function = many_rows
    else:
        weight = dequantize_packed(data, scale, zero, spec, [outputs, columns], x.dtype)
        return F.linear(x, weight, bias if bias is None else bias.to(x.dtype))
    function(
        *reader.arguments(data, scale, zero),
        flat.data_ptr(),
        rows,
        flat.stride(0),
        packed.KINDS[x.dtype],
        y.data_ptr(),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else packed.KINDS[bias.dtype],
        packed.threads(rows * outputs * columns),
    )
    return y


@linear.implementation("cpu", refuses)
def linear_cpu(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, activation: str | None
) -> Tensor:
    # The activation is plain torch, for Inductor to fuse with what follows.
    y = linear_packed(x, data, scale, zero, bias, spec)
    return y if activation is None else ACTIVATIONS[activation](y)
