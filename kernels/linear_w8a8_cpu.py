"""linear_w8a8 of integers on the CPU: a few rows by linear on rounded x, more by products of codes.

Codes of x are made by torch code that fuses with what comes before. Our own C++ (kernels/cpu/many_codes.h) multiplies
codes of any width in groups, by matrix instructions where the processor has them (many_codes_tiles.h). Where it cannot,
or torch alone has matrix instructions, torch multiplies 8 bits with a scale per row or for all: a slab of codes at a
time, which stays in the cache, is made signed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels import linear_cpu
from qcompile.kernels._cpp import processor_features
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear_w8a8 import linear_w8a8
from qcompile.ops.registry import known, opaque
from qcompile.quant.activation import ActivationSpec, activation_codes

# From this many rows on. Linear on rounded x takes so many times as long as many_codes, bfloat16, one thread, Zen 4:
#                            4 rows   8 rows   16 rows   32 rows   512 rows
# u4/g64/asym 2048 × 2048    0.96     1.3      1.8       1.75      1.7
# i8/row/sym  2048 × 2048    1.1      1.9      2.0       1.9       1.95
MIN_ROWS = 5
# The same by matrix instructions: torch's bfloat16 linear takes so many times as long as linear on rounded x | this,
# two cores of a Xeon with AMX, u4/g64/asym 8192 × 2048:
# 4 rows 3.2 | 2.5, 8 rows 1.7 | 2.4, 64 rows 1.6 | 2.0, 512 rows 1.6 | 2.2
# i8/row/sym, torch's product of codes | this: 17 rows 0.7 | 2.0, 64 rows 0.7 | 2.1, 512 rows 1.0 | 3.1
MIN_ROWS_OF_TILES = 7
# The same of torch's product. ms of one thread, linear on rounded x | this, Zen 4:
#                         24 rows        64 rows        512 rows
# float32  8192 × 2048    15.3 | 12.5    41.7 | 22.3     380 | 104
# bfloat16 8192 × 2048     5.7 | 11.3    19.6 | 19.0     174 | 121
MIN_ROWS_OF_TORCH = {torch.float32: 24, torch.bfloat16: 64, torch.float16: 24}
SLAB_BYTES = 4 << 20
# Without one of these, sums of two products in torch may saturate at 16 bits.
EXACT = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}


def refuses(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> str | None:
    """Why this kernel cannot run the call, or None."""
    if reason := linear_cpu.refuses(x, data, scale, zero, bias, spec, activation):
        return reason
    if (columns := known(x.shape[-1])) is None:
        return f"the number of inputs is not known, but {x.shape[-1]}"
    if way_of(spec, columns, x.dtype) is None:
        return f"{spec} by {x.dtype}: this processor has nothing faster for codes than for what they stand for"
    return None


def way_of(spec: str, columns: int, dtype: torch.dtype) -> Callable[..., None] | None:
    """What multiplies the codes of many rows, or None."""
    reader, features = packed.Reader.of(spec, columns), processor_features()
    if reader.many_codes_tiles is not None:
        return _multiply_codes
    by_torch = spec in ("i8/row/sym", "i8/tensor/sym") and not EXACT.isdisjoint(features)
    if by_torch and "amx_int8" in features:
        return _multiply_in_torch
    matrices_of_floats = "amx_bf16" in features and dtype == torch.bfloat16
    if reader.many_codes is not None and not matrices_of_floats:
        return _multiply_codes
    return _multiply_in_torch if by_torch else None


def least_rows(spec: str, columns: int, dtype: torch.dtype) -> int:
    """From how many rows on codes are multiplied."""
    if way_of(spec, columns, dtype) is _multiply_in_torch:
        return MIN_ROWS_OF_TORCH[dtype]
    return MIN_ROWS if packed.Reader.of(spec, columns).many_codes_tiles is None else MIN_ROWS_OF_TILES


def _fake(
    codes: Tensor, step: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty((*codes.shape[:-1], data.shape[0]), dtype=dtype)


@opaque(_fake)
def linear_codes(
    codes: Tensor, step: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    columns, outputs = codes.shape[-1], data.shape[0]
    rows = codes.reshape(-1, columns)
    way = way_of(spec, columns, dtype)
    assert way is not None
    if rows.shape[0] < least_rows(spec, columns, dtype) or outputs == 0:
        x = (codes.to(torch.float32) * step).to(dtype)
        return linear_cpu.linear_packed(x, data, scale, zero, bias, spec)
    y = codes.new_empty((rows.shape[0], outputs), dtype=dtype)
    way(rows.contiguous(), step.reshape(-1, 1), data, scale, zero, bias, spec, y)
    return y.reshape(*codes.shape[:-1], outputs)


def _multiply_codes(
    codes: Tensor, step: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str,
    y: Tensor,
) -> None:  # fmt: skip
    rows, columns = codes.shape
    reader, steps = packed.Reader.of(spec, columns), step.expand(rows, 1).contiguous()
    data, scale = packed.with_dense_rows(data), packed.with_dense_rows(scale)
    zero = None if zero is None else packed.with_dense_rows(zero)
    bias = None if bias is None else bias.contiguous()
    function = reader.many_codes_tiles or reader.many_codes
    assert function is not None
    function(
        *reader.arguments(data, scale, zero),
        codes.data_ptr(),
        steps.data_ptr(),
        rows,
        packed.KINDS[y.dtype],
        y.data_ptr(),
        None if bias is None else bias.data_ptr(),
        0 if bias is None else packed.KINDS[bias.dtype],
        packed.threads(rows * y.shape[1] * columns),
    )


def _multiply_in_torch(
    codes: Tensor, step: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str,
    y: Tensor,
) -> None:  # fmt: skip
    columns, outputs = codes.shape[1], data.shape[0]
    slab = max(1, SLAB_BYTES // columns)
    for first in range(0, outputs, slab):
        count = min(slab, outputs - first)
        weight = data.narrow(0, first, count).bitwise_xor(0x80).view(torch.int8)[:, :columns]
        scales = scale if scale.shape[0] == 1 else scale.narrow(0, first, count)
        part = torch.ops.aten._int_mm.default(codes, weight.t()) * step
        part *= scales.to(torch.float32).t()
        if bias is not None:
            part += bias.narrow(0, first, count)
        y.narrow(1, first, count).copy_(part)


@linear_w8a8.implementation("cpu", refuses)
def linear_w8a8_cpu(
    x: Tensor,
    x_scale: Tensor | None,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> Tensor:
    codes, step = activation_codes(x, x_scale, ActivationSpec.parse(rounding))
    y = linear_codes(codes, step, data, scale, zero, bias, spec, x.dtype)
    return y if activation is None else ACTIVATIONS[activation](y)
