"""linear and dequantize on the CPU, in our own C++ (kernels/cpu), compiled once for each width of code.

One row of x reads the packed weight at the speed of memory; a few rows share one unpacking of it; many rows multiply
tiles of the weight that are unpacked into the cache. No float copy of the weight is ever written to memory.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.kernels._cpp import load_cpp
from qcompile.ops.activation import ACTIVATIONS
from qcompile.ops.linear import dequantize, linear
from qcompile.ops.registry import opaque
from qcompile.quant.granularity import PerGroup, PerOutputGroup, PerTensor
from qcompile.quant.spec import QSpec

# The order matters: they are put together into one text.
SOURCES = ("codes.h", "dequantize.h", "few_rows_dot.h", "few_rows.h", "many_rows.h")

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}

FEW_ROWS = 8
TILE_BYTES = 512 * 1024

P, I, L, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
WEIGHT = [P, P, P, L, L, L, L, L, L, I, I, FLOAT]


@functools.cache
def _library(bits: int) -> ctypes.CDLL:
    folder = Path(__file__).parent / "cpu"
    library = load_cpp(f"#define BITS {bits}\n" + "".join((folder / name).read_text("utf-8") for name in SOURCES))
    library.dequantize.argtypes = [*WEIGHT, P, I, I]
    library.few_rows.argtypes = [*WEIGHT, P, L, L, I, P, P, I, I]
    for function in (library.dequantize, library.few_rows):
        function.restype = None
    return library


@functools.lru_cache(maxsize=4096)
def _plan(spec: str, columns: int) -> tuple[ctypes.CDLL, int, bool, float]:
    """The library, the inputs that share a scale, whether rows have scales of their own, and the constant zero."""
    parsed = QSpec.parse(spec)
    group = parsed.granularity.size if isinstance(parsed.granularity, PerGroup) else columns
    by_row = not isinstance(parsed.granularity, PerTensor)
    return _library(parsed.element.bits), group, by_row, float(parsed.offset)


def _weight(data: Tensor, scale: Tensor, zero: Tensor | None, columns: int, group: int, by_row: bool, offset: float):
    return (
        data.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        data.shape[0],
        columns,
        group,
        data.stride(0),
        scale.stride(0) if by_row else 0,
        zero.stride(0) if by_row and zero is not None else 0,
        KINDS[scale.dtype],
        0 if zero is None else KINDS[zero.dtype],
        offset,
    )


def _fake(x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


@opaque(_fake)
def linear_packed(
    x: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, spec: str
) -> Tensor:
    columns, rows = x.shape[-1], data.shape[0]
    library, group, by_row, offset = _plan(spec, columns)
    y = x.new_empty((*x.shape[:-1], rows))
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    count = flat.shape[0]
    if count * rows == 0:
        return y
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    weight = _weight(data, scale, zero, columns, group, by_row, offset)
    threads, kind = torch.get_num_threads(), KINDS[x.dtype]
    if count <= FEW_ROWS:
        pointer, bias_kind = (None, 0) if bias is None else (bias.data_ptr(), KINDS[bias.dtype])
        library.few_rows(
            *weight, flat.data_ptr(), count, flat.stride(0), kind, y.data_ptr(), pointer, bias_kind, threads
        )
    return y
