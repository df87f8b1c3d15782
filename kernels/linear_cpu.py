"""linear on the CPU, in C++ of our own (kernels/cpu). The number of rows, known only at the call, decides how.

A few rows are bound by reading the weight: each code is read once, unpacked in registers and multiplied by all of them
(few_rows). More rows share tiles of the weight that are dequantized into the cache, or tiles of its codes (many_rows),
in bfloat16 for the processor's matrix instructions where it has them (many_rows_tiles). Where there are no vectors of
512 bits for that, or matrix instructions that only torch may use, slabs of a float copy go to torch.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.kernels import _packed_cpu as packed
from qcompile.kernels._cpp import load_cpp, processor_features, text_of
from qcompile.kernels.dequantize_cpu import dequantize_packed
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import linear
from qcompile.ops.registry import opaque

# What torch calls without Python, put together into one text, in this order.
SOURCES = (
    "op.h",
    "vectors.h",
    "team.h",
    "cache_rows.h",
    "likeliest.h",
    "fused.h",
    "linear.h",
    "linear_op.cpp",
    "rope.h",
    "attention.h",
    "chain_text.h",
    "chain_tensors.h",
    "chain.h",
    "chain_op.cpp",
)

# The most rows that few_rows takes; where it multiplies 16 bits as integers, of codes of fewer than eight bits, of
# others, and of the former in bfloat16 beside products of pairs. ms of one thread, few_rows | many_rows, float32
# 16384 × 2048, Zen 4:
#               4 rows        5 rows        8 rows
# u4 float32    4.53 | 6.78   7.99 | 6.57   11.4 | 8.36
# u8 float32    4.92 | 7.26   7.96 | 7.05   11.9 | 8.81
# Times torch's bfloat16 linear, two threads of Zen 5, weights from memory, few_rows | many_rows, where that has
# products of pairs without transposing (many_rows_dot.h: u2, u4, u8) and where not:
#                   8 rows        10 rows       12 rows       14 rows       16 rows
# u2 2048 × 8192    2.36 | 2.52   1.93 | 2.18   1.66 | 2.04
# u4 2048 × 8192    2.22 | 2.16   1.97 | 2.07   1.69 | 2.00                 1.43 | 1.78
#    8192 × 2048    2.28 | 2.26                 1.66 | 1.93                 1.38 | 1.70
# u8 2048 × 8192    1.79 | 1.28   1.46 | 1.45   1.29 | 1.37
#    8192 × 2048    1.69 | 1.29   1.46 | 1.48   1.28 | 1.52
# u3 2048 × 8192    2.09 | 1.29                 1.52 | 1.22   1.47 | 1.26   1.29 | 1.21
# u5 8192 × 2048    2.04 | 1.35                 1.52 | 1.32   1.39 | 1.32   1.32 | 1.23
# u7 2048 × 8192    2.12 | 0.94                 1.64 | 0.97                 1.46 | 1.04
# A step of decoding in one call (ops/fused_linear.FEW_ROWS) needs as many as eight.
FEW_ROWS = 4
FEW_ROWS_OF_NARROW_CODES, FEW_ROWS_OF_16_BITS, FEW_ROWS_BESIDE_PAIRS = 16, 10, 8
# Beside many_rows_tiles. µs of torch's bfloat16 linear by those of few_rows | many_rows_tiles (with panels of half the
# inputs and slower bookkeeping), two cores of a Xeon with AMX, three copies in turn, 8192 × 2048 and 2048 × 8192:
#                   4 rows        8 rows        12 rows       16 rows       64 rows   512 rows
# u4 8192 × 2048    3.2 | 1.7     1.7 | 1.7     1.1 | 1.7     0.9 | 1.7     1.6       1.6
# u4 2048 × 8192    3.2 | 1.5     1.6 | 1.5     1.1 | 1.3     0.8 | 1.4     1.2       1.3
# u8 8192 × 2048    2.5 | 1.5     1.3 | 1.4     0.8 | 1.4     0.7 | 1.5     1.3       1.7
# u8 2048 × 8192    2.5 | 1.1     1.2 | 1.0     0.8 | 1.0     0.6 | 0.9     1.0       1.3
FEW_ROWS_BESIDE_TILES = 8
# The most rows without the copy: where there is many_rows, the same beside AMX, and without it (AVX2 code on Zen 4,
# bfloat16, few_rows | copy: 3.1 | 4.0 ms for 8 rows, 6.1 | 4.6 for 16). Beside AMX that is torch's alone it is an
# estimate: torch's linear took 10.6 ms for 64 rows and 47.6 for 512, 16384 × 2048 on a Xeon with AMX, where AVX512
# alone could not beat 100 for 512.
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
def linear_anyhow(
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
    make_known(spec, columns)
    rows, reader, kind = flat.shape[0], packed.Reader.of(spec, columns), packed.KINDS[x.dtype]
    if (function := function_for(rows, x.dtype, reader)) is None:
        _multiply_copy(flat, data, scale, zero, bias, spec, y.view(rows, outputs))
        return y
    function(
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


@opaque(_fake)
def linear_packed(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str
) -> Tensor:
    # After the first call linear_op.cpp takes this one's place, and gives back what is not for it.
    return linear_anyhow(x, data, scale, zero, bias, spec)


def function_for(rows: int, dtype: torch.dtype, reader: packed.Reader) -> Callable[..., None] | None:
    """What multiplies so many rows, or None: slabs of a float copy go to torch."""
    if rows <= most_few_rows(dtype, reader):
        return reader.few_rows
    if has_tiles(dtype, reader):
        return reader.many_rows_tiles
    return None if rows > _rows_without_copy(dtype, reader.many_rows is not None) else reader.many_rows


def has_tiles(dtype: torch.dtype, reader: packed.Reader) -> bool:
    """Whether matrix instructions multiply rows of x in `dtype`."""
    return dtype == torch.bfloat16 and reader.many_rows_tiles is not None


def most_few_rows(dtype: torch.dtype, reader: packed.Reader) -> int:
    """The most rows of x that its few_rows takes."""
    if reader.many_rows is None:
        return ROWS_WITHOUT_MANY_ROWS
    if has_tiles(dtype, reader):
        return FEW_ROWS_BESIDE_TILES
    if dtype == torch.float32 or not reader.has_dot:
        return FEW_ROWS
    if reader.bytes >= reader.columns:
        return FEW_ROWS_OF_16_BITS
    beside_pairs = dtype == torch.bfloat16 and reader.has_many_rows_dot
    return FEW_ROWS_BESIDE_PAIRS if beside_pairs else FEW_ROWS_OF_NARROW_CODES


@functools.lru_cache(maxsize=4096)
def make_known(spec: str, columns: int) -> None:
    """Tell linear_op.cpp how to multiply rows by weights of this spec."""
    if (op := without_python()) is None:
        return
    reader = packed.Reader.of(spec, columns)
    three = ctypes.c_int64 * 3
    most = three(*(most_few_rows(dtype, reader) for dtype in packed.FLOATS))
    many = three(*(_most_many_rows(dtype, reader) for dtype in packed.FLOATS))
    few_rows = ctypes.cast(reader.share_few_rows, ctypes.c_void_p)  # type: ignore[arg-type]
    many_rows = ctypes.cast(reader.many_rows, ctypes.c_void_p) if reader.many_rows else None  # type: ignore[arg-type]
    shape = (reader.group, reader.groups, reader.height, reader.bytes, reader.by_row)
    op.know(spec.encode(), columns, few_rows, many_rows, most, many, *shape, packed.ADDED * reader.added, reader.offset)


@functools.cache
def without_python() -> ctypes.CDLL | None:
    """linear_packed and fused_packed in C++, from now on; None, with a warning, if torch's headers do not compile."""
    work = f"constexpr long WORK_OF_A_THREAD = {packed.WORK_OF_A_THREAD};\n"
    try:
        op = load_cpp(work + text_of(*SOURCES))
    except RuntimeError as error:
        warnings.warn(f"qcompile: linears are called through Python: {error}", stacklevel=2)
        return None
    size, number = ctypes.c_int64, ctypes.c_int
    pointer = ctypes.c_void_p
    op.know.argtypes = [ctypes.c_char_p, size, *[pointer] * 4, *[size] * 4, number, number, ctypes.c_float]
    op.bind_likeliest.argtypes = [*[pointer] * 2, size, pointer, size, *[pointer] * 5, size]
    op.bind_lengths.argtypes = [pointer, size, size]
    op.bind_likeliest.restype = op.bind_lengths.restype = pointer
    op.run_follower.argtypes = [*[pointer] * 2, *[size] * 3, number]
    op.release_follower.argtypes, op.release_chain.argtypes, op.let_follow.argtypes = [pointer], [size], [size, pointer]
    for function in (op.know, op.forget, op.run_follower, op.release_follower, op.release_chain, op.let_follow):
        function.restype = None
    return op


def _most_many_rows(dtype: torch.dtype, reader: packed.Reader) -> int:
    """The most rows of x that its many_rows takes; 0 where it takes none."""
    if reader.many_rows is None or has_tiles(dtype, reader):
        return 0
    return _rows_without_copy(dtype, True)


@functools.cache
def _rows_without_copy(dtype: torch.dtype, has_many_rows: bool) -> int:
    if not has_many_rows:
        return ROWS_WITHOUT_MANY_ROWS
    return ROWS_BESIDE_AMX if dtype == torch.bfloat16 and "amx_bf16" in processor_features() else ALL_ROWS


def _multiply_copy(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str, y: Tensor
) -> None:
    columns, outputs = x.shape[1], data.shape[0]
    height = packed.Reader.of(spec, columns).height
    slab = -(-max(1, SLAB_BYTES // (columns * x.itemsize)) // height) * height
    for first in range(0, outputs, slab):
        count = min(slab, outputs - first)
        # One scale for the whole weight is not narrowed with it.
        tiles = (first // height, -(-count // height))
        sides = [side if side is None or side.shape[0] == 1 else side.narrow(0, *tiles) for side in (scale, zero)]
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
