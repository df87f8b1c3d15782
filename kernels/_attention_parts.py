"""What programs of attention that read some of the keys each leave for one another.

With splits > 1 each leaves what it found in memory, and `_combine` makes one result of it; or they are a cluster, and
each makes some columns of the result of what all give it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels._clusters import exchange, give, meet, take
from qcompile.kernels._tiles import (
    cdiv,
    constexpr_function,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    tl,
    triton,
)

# Of a row that a program of `_combine` makes, by one warp, which waits for no other.
COLUMNS = 32


def partial_results(like: Tensor, rows: int, splits: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where programs leave what they found in their parts: top and total, and the weighted sums of the values."""
    sums = like.new_empty(rows, 2, splits, dtype=torch.float32)
    return sums, like.new_empty(rows, splits, columns, dtype=torch.float32)


def combine(sums: Tensor, parts: Tensor, out: Tensor) -> None:
    """Write to `out`, rows of columns one after the other, what all parts together give."""
    rows, splits, columns = parts.shape
    launch(
        _combine,
        (rows, cdiv(columns, COLUMNS)),
        sums,
        parts,
        out,
        DV=columns,
        BLOCK_DV=COLUMNS,
        SPLITS=splits,
        PDL=dependent_launch(out),
        num_warps=1,
    )


@triton.jit
def leave(y, top, total, out_ptr, sums_ptr, parts_ptr, result, inside, part, splits, dv, DV: tl.constexpr):
    """Store the rows that are `inside` as rows of the result, or where there are parts what `_combine` makes it of."""
    if parts_ptr is None:
        # Rows that attend to nothing are zeros.
        y /= tl.where(total == 0.0, 1.0, total)
        tl.store(out_ptr + result * DV + dv, y.to(out_ptr.dtype.element_ty), mask=inside & (dv < DV))
    else:
        tl.store(sums_ptr + result * 2 * splits + part, top, mask=inside)
        tl.store(sums_ptr + (result * 2 + 1) * splits + part, total, mask=inside)
        tl.store(parts_ptr + (result * splits + part) * DV + dv, y, mask=inside & (dv < DV))


@constexpr_function
def given(splits: int, rows: int, columns: int) -> int:
    """Numbers that `leave_to_cluster` gives to each program."""
    return rows * (columns + 2 * splits)


@triton.jit
def leave_to_cluster(
    y, top, total, out_ptr, first, row, rows, part, DV: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr
):
    """As `leave`, of a cluster whose programs have a part each: store `rows` rows, ROWS at most, behind the first row
    of the result, of which each program makes some columns. `row` counts those of y."""
    WIDTH: tl.constexpr = y.shape[1] // SPLITS
    MADE: tl.constexpr = ROWS * WIDTH
    TOPS: tl.constexpr = SPLITS * MADE
    TOTALS: tl.constexpr = TOPS + SPLITS * ROWS
    inside, at = row < ROWS, part * ROWS + row
    column, for_all = tl.arange(0, SPLITS * WIDTH)[None, :], tl.arange(0, SPLITS)[None, :]
    meet()
    give(top, TOPS + at, for_all, inside)
    give(total, TOTALS + at, for_all, inside)
    give(y, at * WIDTH + column % WIDTH, column // WIDTH, inside)
    exchange()
    i, part_of = tl.arange(0, MADE), tl.arange(0, SPLITS)[:, None]
    at = part_of * ROWS + i[None, :] // WIDTH
    y = of_parts(take(part_of * MADE + i[None, :]), take(TOPS + at), take(TOTALS + at))
    row, column = i // WIDTH, part * WIDTH + i % WIDTH
    tl.store(out_ptr + (first + row) * DV + column, y.to(out_ptr.dtype.element_ty), mask=(row < rows) & (column < DV))


@triton.jit
def of_parts(y, top, total):
    """The result of what is one above the other."""
    highest = tl.max(top, 0, keep_dims=True)
    weight = tl.exp(top - tl.where(highest == float("-inf"), 0.0, highest))
    whole = tl.sum(total * weight, 0)
    # Rows that attend to nothing are zeros.
    return tl.sum(y * weight, 0) / tl.where(whole == 0.0, 1.0, whole)


@triton.jit
def _combine(
    sums_ptr, parts_ptr, out_ptr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
):
    """One program makes some columns of a row of the result."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SPLITS)[:, None]
    column = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)[None, :]
    top = tl.load(sums_ptr + row * 2 * SPLITS + part)
    total = tl.load(sums_ptr + (row * 2 + 1) * SPLITS + part)
    y = tl.load(parts_ptr + (row * SPLITS + part) * DV + column, mask=column < DV, other=0.0)
    y = of_parts(y, top, total)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    column = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    tl.store(out_ptr + row * DV + column, y.to(DTYPE), mask=column < DV)
