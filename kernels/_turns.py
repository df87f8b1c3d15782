"""Tiles of which a multiprocessor makes one after another, chosen by how long all turns take: of linear_wgmma and of
linear_codes. As in _tuning, rows, outputs and inputs are M, N and K, and numbers were measured.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

from qcompile.kernels._tiles import cdiv
from qcompile.kernels._tuning import Device

# Inputs of a step of linear_wgmma.
WGMMA_CODES = 128
# NOTE: µs of a step of linear_wgmma by rows of x, of 4 bits in groups of 64, H100, fitted to times of whole linears;
# 112, 176 and 240 rows take as long as what is next. Eight rows behind a power of two keep one row more from another
# turn. A tile takes WGMMA_TILE_US besides. The sum of a tile's parts takes WGMMA_FINISH_US, and WGMMA_PART_US for each
# of its numbers behind the first WGMMA_PARTS_NEAR.
WGMMA_STEP_US = {128: 0.92, 136: 1.04, 144: 1.05, 160: 1.08, 192: 1.18, 200: 1.31, 208: 1.36, 224: 1.38}
WGMMA_STEP_US |= {256: 1.45, 264: 1.64}
WGMMA_TILE_US, WGMMA_FINISH_US, WGMMA_PART_US, WGMMA_PARTS_NEAR = 2.0, 2.5, 5.5e-6, 1_200_000
# Rows behind whole tiles that linear_few makes. It takes FEW_US and reads so many bytes a µs.
LEFT_OVER, FEW_US, FEW_BYTES = 8, 2.5, 2.5e6

# Outputs of a tile of linear_codes, and inputs of its steps: what the copy engine lays side by side.
PRODUCT_OUTPUTS = PRODUCT_CODES = 128


@dataclass(frozen=True)
class WgmmaTile:
    """A tile of linear_wgmma: 128 outputs of `tokens` rows of x, from one of so many `splits` of the inputs.

    stages  steps in shared memory, two at least
    last    splits of the tiles that full turns of all multiprocessors leave over, where others are whole
    """

    tokens: int
    stages: int
    splits: int
    last: int = 1

    @property
    def shares(self) -> int:
        """Parts of the inputs of tiles that are not whole."""
        return max(self.splits, self.last)


@dataclass(frozen=True)
class ProductTile:
    """What a program of linear_codes makes at a time: PRODUCT_OUTPUTS outputs of `tokens` rows of x, from one of so
    many `splits` of the inputs.

    at_once   rows of x that an instruction takes
    stages    steps in shared memory
    programs  that there are at most
    """

    tokens: int
    at_once: int
    stages: int
    splits: int
    programs: int


@functools.lru_cache(maxsize=1024)
def wgmma_tile(rows: int, outputs: int, inputs: int, bits: int, device: Device) -> WgmmaTile:
    """The tile of which all take the least time, in as many turns as it needs on all multiprocessors."""
    steps, blocks, processors = cdiv(inputs, WGMMA_CODES), cdiv(outputs, 128), device.processors

    def us(choice: tuple[int, int]) -> float:
        tokens, shares = choice
        left = left_over(rows, tokens, bits)
        tiled = us_tiled(rows - left, tokens, shares)
        return tiled if not left else tiled + FEW_US + outputs * inputs * bits / (8 * FEW_BYTES)

    def us_tiled(rows: int, tokens: int, shares: int) -> float:
        down, whole = cdiv(rows, tokens), blocks if shares == 1 else _full_turns(tokens, rows, outputs, device)
        step, others = WGMMA_STEP_US[tokens], (blocks - whole) * down * shares
        us = cdiv(whole * down, processors) * (steps * step + WGMMA_TILE_US)
        if others:
            us += cdiv(others, processors) * (cdiv(steps, shares) * step + WGMMA_TILE_US)
            numbers = shares * rows * (blocks - whole) * 128
            us += WGMMA_FINISH_US + max(0, numbers - WGMMA_PARTS_NEAR) * WGMMA_PART_US
        return us

    counts = [count for count in (1, 2, 3, 4, 8) if count <= max(1, steps // 4)]
    tokens, shares = min(itertools.product(WGMMA_STEP_US, counts), key=us)
    rows -= left_over(rows, tokens, bits)
    all_in_parts = not _full_turns(tokens, rows, outputs, device)
    splits, last = (shares, 1) if all_in_parts else (1, shares)
    return WgmmaTile(tokens, wgmma_stages(tokens, bits, device), splits, last)


def left_over(rows: int, tokens: int, bits: int) -> int:
    """How many rows behind tiles of so many linear_few makes: none of codes of one or two bits, which it cannot sum in
    float16."""
    left = rows % tokens
    return left if rows > tokens and left <= LEFT_OVER and bits > 2 else 0


def whole_outputs(tile: WgmmaTile, rows: int, outputs: int, device: Device) -> int:
    """The first outputs, as many as are made whole."""
    if tile.shares == 1:
        return outputs
    full = 0 if tile.splits > 1 else _full_turns(tile.tokens, rows, outputs, device)
    return min(outputs, full * 128)


def _full_turns(tokens: int, rows: int, outputs: int, device: Device) -> int:
    """Blocks of 128 outputs whose tiles fill turns of all multiprocessors."""
    down = cdiv(rows, tokens)
    return down * cdiv(outputs, 128) // device.processors * device.processors // down


def wgmma_stages(tokens: int, bits: int, device: Device) -> int:
    """Steps that shared memory has room for, beside the outputs on their way."""
    return (device.shared_bytes - (5 << 10)) // (WGMMA_CODES * (2 * tokens + 16 * bits))


def product_tile(rows: int, outputs: int, inputs: int, integers: bool, device: Device) -> ProductTile:
    """The tile with which an H100 is done first, about.

    NOTE: the linears of a layer of Llama-3-8B, H100, 32, 256 and 2048 rows: i8 95, 133 and 598 µs, fp8 96, 130 and
    747, bfloat16 by cuBLAS 171, 202 and 1242. The best of the tiles below: 1% less.
    """
    steps, from_memory = cdiv(inputs, PRODUCT_CODES), outputs * inputs / 2.5e6
    best, least = (64, 1), math.inf
    for tokens, splits in itertools.product((64, 128, 256), (1, 2)):
        items = cdiv(rows, tokens) * cdiv(outputs, PRODUCT_OUTPUTS) * splits
        # µs of a step: a multiprocessor's products, or its share of what the L2 cache gives.
        step = max(tokens / (400 if integers else 312), (tokens + PRODUCT_OUTPUTS) / 600)
        on_chip = cdiv(items, device.processors) * cdiv(steps, splits) * step
        us = max(from_memory, on_chip) + on_chip / 16
        if splits > 1:
            us += 2.6 + 4.1e-6 * rows * outputs * splits  # another launch, which reads what this one wrote
        if us < least:
            best, least = (tokens, splits), us
    tokens, splits = best
    held = 2 * tokens * PRODUCT_OUTPUTS if splits == 1 else 0
    stages = (device.shared_bytes - 1024 - held) // ((tokens + PRODUCT_OUTPUTS) * PRODUCT_CODES)
    return ProductTile(tokens, min(tokens, 128), min(6, stages), splits, device.processors)
