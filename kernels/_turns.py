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
# NOTE: µs of a step of linear_wgmma by rows of x, of 4 bits in groups of 64, H100. A number written and read again for
# the sum of a tile's parts takes WGMMA_PART_US, their sum itself WGMMA_FINISH_US.
WGMMA_STEP_US = {128: 0.9, 192: 1.05, 256: 1.4}
WGMMA_PART_US, WGMMA_FINISH_US = 2e-6, 3.0

# Outputs of a tile of linear_codes, and inputs of its steps: what the copy engine lays side by side.
PRODUCT_OUTPUTS = PRODUCT_CODES = 128


@dataclass(frozen=True)
class WgmmaTile:
    """A tile of linear_wgmma: 128 outputs of `tokens` rows of x, from its share of the inputs.

    stages  steps in shared memory, two at least
    """

    tokens: int
    stages: int
    splits: int


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
    steps = cdiv(inputs, WGMMA_CODES)

    def us(choice: tuple[int, int]) -> float:
        tokens, splits = choice
        turns = cdiv(cdiv(rows, tokens) * cdiv(outputs, 128) * splits, device.processors)
        summed = WGMMA_FINISH_US + splits * rows * outputs * WGMMA_PART_US if splits > 1 else 0.0
        return turns * cdiv(steps, splits) * WGMMA_STEP_US[tokens] + summed

    splits = [count for count in (1, 2, 4, 8) if count <= max(1, steps // 4)]
    tokens, parts = min(itertools.product(WGMMA_STEP_US, splits), key=us)
    return WgmmaTile(tokens, wgmma_stages(tokens, bits, device), parts)


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
