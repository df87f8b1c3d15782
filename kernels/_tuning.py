"""Tile sizes by shape class, and which way a linear takes. The only place for numbers that were measured.

Rows, outputs and inputs are M, N and K of out (M, N) = x (M, K) @ W.T. Chunks are the 16-byte chunks of the smallest
plane that a step takes from each weight row; `step` is how many codes one of them covers (_weight.Weight.step).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qcompile.kernels._tiles import cdiv, power_of_two

# A float copy of this many weights (32 MiB in 16 bits) stays in the L2 cache between its writing and its reading.
SLAB_ELEMENTS = 16 << 20


@dataclass(frozen=True)
class GemvTile:
    """What a program of linear_gemv makes: `outputs` columns of every row; powers of two."""

    outputs: int
    chunks: int
    warps: int


@dataclass(frozen=True)
class GemmTile:
    """What a program of linear_gemm makes: rows x outputs; powers of two but for splits."""

    rows: int
    outputs: int
    chunks: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DequantizeTile:
    outputs: int
    chunks: int
    warps: int


def way(rows: int, outputs: int, inputs: int, bits: int) -> str:
    """The fastest way for this shape: `gemv`, `gemm` or `dequantize`."""
    if rows <= 8:
        return "gemv"
    return "gemm" if rows < 256 else "dequantize"


def gemv_tile(rows: int, outputs: int, inputs: int, step: int) -> GemvTile:
    # One chunk a thread and a step; a row that is short leaves no thread idle.
    chunks = max(32, min(128, power_of_two(cdiv(inputs, step))))
    return GemvTile(outputs=2 if rows > 4 else 4, chunks=chunks, warps=chunks // 32)


def gemm_tile(rows: int, outputs: int, inputs: int, step: int, dtype: torch.dtype) -> GemmTile:
    if dtype == torch.float32:
        return GemmTile(rows=32, outputs=32, chunks=2, splits=1, warps=4, stages=2)
    chunks = 4 if step <= 64 else 2
    if rows <= 16:
        tile_rows, tile_outputs = 16, 64
    elif rows <= 32:
        tile_rows, tile_outputs = 32, 64
    elif rows <= 64:
        tile_rows, tile_outputs = 64, 64
    else:
        tile_rows, tile_outputs = 128, 128
    tiles = cdiv(rows, tile_rows) * cdiv(outputs, tile_outputs)
    steps = cdiv(inputs, step * chunks)
    splits = max(1, min(8, 256 // tiles, steps // 4))
    return GemmTile(tile_rows, tile_outputs, chunks, splits, warps=4 if tile_rows < 128 else 8, stages=3)


def dequantize_tile(bits: int) -> DequantizeTile:
    return DequantizeTile(outputs=8, chunks=16, warps=4)
