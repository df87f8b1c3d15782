"""Tile sizes by shape class, and which way a linear takes: numbers that were measured.

Rows, outputs and inputs are M, N and K of out (M, N) = x (M, K) @ W.T. Chunks are the 16-byte chunks of the smallest
plane that a step takes from each weight row; `step` is how many codes one of them covers (_weight.Weight.step).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from qcompile.kernels._tiles import cdiv, power_of_two

# A float copy of this many weights (32 MiB in 16 bits) stays in the L2 cache between its writing and its reading.
SLAB_ELEMENTS = 16 << 20

# The step of weights of four bits.
FOUR_BITS = 32


@dataclass(frozen=True)
class GemvTile:
    """What a program of linear_gemv makes: `outputs` columns of every row; powers of two."""

    outputs: int
    chunks: int
    warps: int


@dataclass(frozen=True)
class DotTile:
    """What a program of linear_dot takes; powers of two but for the steps.

    outputs  weight rows of a step
    split    warps side by side along a row
    ahead    steps on their way to shared memory
    words    of a chunk, for a thread
    late     does the next kernel begin only when this one has its scales, or has had them copied?
    """

    outputs: int
    split: int
    warps: int
    steps: int = 1
    ahead: int = 1
    words: int = 4
    late: bool = False

    def held(self, inputs: int, step: int, bits: int) -> int:
        """Bytes of shared memory for weights; `step` is the weight's."""
        codes = 32 * self.split * step * self.words // 4
        return self.outputs * cdiv(inputs, codes) * codes * bits // 8 * min(self.ahead, self.steps)


@dataclass(frozen=True)
class FewTile:
    """What a program of linear_few makes: 16 * warps / split outputs of `tokens` rows of x, from one of so many `parts`
    of the inputs.

    codes     inputs of a warp in a step
    stages    steps in shared memory
    split     warps side by side along a row
    together  programs that a multiprocessor has registers for
    """

    tokens: int
    codes: int
    stages: int
    parts: int
    split: int
    warps: int
    together: int

    @property
    def rows(self) -> int:
        return 16 * self.warps // self.split

    def stage_bytes(self, bits: int) -> int:
        """Of codes and of x."""
        return self.split * self.codes * (self.rows * bits // 8 + 2 * self.tokens)


@dataclass(frozen=True)
class MmaTile:
    """What a program of linear_mma makes: 16 * warps outputs of `tokens` rows of x, from its share of the inputs.

    codes        inputs of a step
    stages       steps in shared memory, three at least for warp groups
    together     programs that a multiprocessor has registers for
    warp_groups  do four warps multiply as one (wgmma)?
    """

    tokens: int
    codes: int
    stages: int
    splits: int
    warps: int
    together: int
    warp_groups: bool

    @property
    def ahead(self) -> int:
        """Steps on their way. A warp group's products run on while it unpacks the next step's codes."""
        return self.stages - (2 if self.warp_groups else 1)

    def stage_bytes(self, bits: int) -> int:
        """Of codes and of x."""
        return self.codes * (2 * self.warps * bits + 2 * self.tokens)


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
    """What a program of dequantize_gpu writes; and of how many times SLAB_ELEMENTS there is a float copy at once."""

    outputs: int
    chunks: int
    warps: int
    slabs: int = 1


@dataclass(frozen=True)
class Device:
    """What the choices depend on: the compute capability's first number, the shared memory of a program, and how many
    multiprocessors there are."""

    major: int = 9
    shared_bytes: int = 227 << 10
    processors: int = 132

    @property
    def tensor_cores(self) -> bool:
        """Does Triton use them?"""
        return self.major >= 8

    @property
    def warp_groups(self) -> bool:
        """Do tensor cores read the weight's tile from shared memory? Else every warp unpacks its own copy of it."""
        return self.major in (9, 10)

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Device:
        if device.type != "cuda":
            return Device()
        properties = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin
        return Device(properties.major, shared, properties.multi_processor_count)


def way(rows: int, integers: bool, step: int, device: Device, sums: bool = True, outputs: int = 0) -> str:
    """The fastest way for so many rows: `dot`, `few`, `mma` or `wgmma`, which need integers, `gemv`, `gemm` or
    `dequantize`.

    `sums` is whether linear_few.can_sum; of fewer `outputs`, wgmma begins at more rows.
    """
    if integers and rows * step <= 128 and rows <= 2 and device.tensor_cores:  # as for asynchronous copies
        return "dot"
    if integers and sums and device.tensor_cores and rows <= (8 if device.major == 9 else 16):
        return "few"
    # NOTE: 28672x4096 of u4/g64, H100: 81 rows 60.1 µs where mma takes 62.9, 96 60.8 and 64.5; of i4/g128 the same.
    most_mma = 80 if outputs >= 16384 else 96
    if integers and step == FOUR_BITS and device.major == 9 and most_mma < rows <= 4096:
        return "wgmma"
    if integers and device.tensor_cores and rows <= (512 if device.major == 9 else 64):
        return "mma"
    if rows <= 8:
        return "gemv"
    return "gemm" if rows < 256 and device.tensor_cores else "dequantize"


def dot_tile(rows: int, outputs: int, inputs: int, step: int, bits: int, device: Device) -> DotTile:
    # A thread takes 32 inputs of a row, 16 at eight bits: those of some words of a chunk.
    words = max(1, min(4, 128 // step))
    share = step * words // 4
    threads = cdiv(inputs, share)
    warps = 4 if threads <= 128 else 8 if threads <= 512 else 16
    split = min(warps, power_of_two(cdiv(threads, 32)))
    parts = cdiv(threads, 32 * split)
    long = parts > 1
    if long and rows == 1 and words < 4:
        # NOTE: a layer of Llama-3-8B of u1/g64, H100: 39.3 -> 37.0 µs; u2 38.1, 38.1; u3 51.5, 50.9.
        words, share, parts = 2 * words, 2 * share, cdiv(parts, 2)
    row_bytes = parts * 32 * split * share * bits // 8
    # Larger programs share what x costs, where they still are several waves.
    wide = outputs >= 16384
    room = 64 << 10 if rows == 1 and wide else 32 << 10
    # A thread holds both rows of x, and the sums and the scales of its weight rows.
    most = min((1024 if wide else 512) // (parts * share), 2048 // step) if rows == 1 else 8
    tall = floor_power(min(most * warps // split, max(4, room // row_bytes)))
    tall = floor_power(min(tall, (device.shared_bytes - (16 << 10)) // row_bytes))
    # Few rows at a time share what x costs with those of other steps; no processor is left without a program.
    # NOTE: two rows, 28672x4096 of i4/g128, H100: four steps 24.1 µs, one 29.3.
    shared = (rows, bits) in ((2, 4), (1, 1)) and wide and threads <= 128
    several = (long or shared) and tall * row_bytes <= 32 << 10
    steps = cdiv(outputs, tall * 2 * device.processors) if several else 1
    steps = max(1, min(steps, (32 if shared else 16) // tall))
    # NOTE: the linears of a layer of Llama-3-8B, H100: two steps of gate and up, both on their way before the wait,
    # 30.6 µs at u1/g64, one 31.9; at u2/g64 34.1 and 33.8.
    ahead = steps if rows == 1 and shared else cdiv(steps, 2)
    # Where rows are long, what the next kernel copies stands in the way of what this one waits for. NOTE: the linears
    # of a layer of Llama-3-8B, i8/g64, H100: 81.6 -> 79.3 µs; other widths 0 to 0.6 µs.
    return DotTile(tall, split, warps, steps, ahead, words, late=long)


def floor_power(n: int) -> int:
    """The largest power of two that is no more than n, and not less than one."""
    return 1 << max(0, n.bit_length() - 1)


def few_tile(rows: int, outputs: int, inputs: int, bits: int, device: Device) -> FewTile:
    tokens, stages, warps = 8 if rows <= 8 else 16, 3, 4
    codes = 256 if bits < 8 else 128
    # Short rows of few outputs are summed up by a program alone.
    split, together = (4, 3) if outputs < 64 * device.processors and inputs <= 8192 else (2, 4)

    def is_too_much() -> bool:
        tile = FewTile(tokens, codes, stages, 1, split, warps, together)
        return together * stages * tile.stage_bytes(bits) > device.shared_bytes

    while is_too_much():
        if codes > 128:
            codes //= 2
        else:
            together -= 1
    programs = cdiv(outputs, 16 * warps // split) * cdiv(rows, tokens)
    parts = floor_power(min(device.processors * together // programs, inputs // (4 * split * codes)))
    if parts == 1 and (side := cdiv(programs, device.processors)) < together:
        # NOTE: 4 rows, 4096x4096 of u4/g64, H100: 6.3 µs instead of 6.7.
        together, stages = side, 4
        while is_too_much():
            stages -= 1
    return FewTile(tokens, codes, stages, parts, split, warps, together)


def mma_tile(rows: int, outputs: int, inputs: int, bits: int, device: Device) -> MmaTile:
    warp_groups = device.major == 9 and rows > 8
    # What the registers of a program hold.
    most = 64 if not warp_groups else 320 if bits in (2, 4) else 192
    tokens = cdiv(rows, cdiv(rows, most))
    # NOTE: the linears of a layer of Llama-3-8B, u4/g64, H100: 33 rows in tiles of 40 87 µs, of 48 97; 65 rows in tiles
    # of 72 113, of 80 119; but 24 rows in one of 24 79, of 32 76, and 56 rows in one of 56 118, of 64 103.
    near = warp_groups and cdiv(tokens, 8) in (5, 9)
    step = 8 if tokens <= 8 or near else 16 if tokens <= 128 else 32
    tokens = cdiv(tokens, step) * step
    # Where there are several waves of programs, larger ones read x less often.
    # NOTE: 28672x4096 of i4/g128, H100: 64 rows 37.5 µs against 43.8, 48 38.5 against 40.4, 32 29.5 against 31.9; of
    # u4/g64, 65 rows 54.6 against 60.4.
    wide = outputs >= 16384 and bits == 4 and warp_groups and 16 < tokens <= 80
    warps = 8 if wide or tokens > 96 else 4
    short = outputs < 64 * device.processors and inputs <= 8192  # soon over: more steps ahead, fewer programs
    together = (3 if short else 4) if tokens <= 16 and bits <= 4 else 2 if tokens <= 96 else 1
    codes = 256 if tokens <= (40 if wide else 48) and bits < 8 else 128 if tokens <= 256 else 64
    stages, fewest = 4, 3 if warp_groups else 2
    while together * stages * codes * (2 * warps * bits + 2 * tokens) > device.shared_bytes:
        if stages > fewest:
            stages -= 1
        elif codes > 128:
            codes //= 2
        else:
            together -= 1
    programs = cdiv(outputs, 16 * warps) * cdiv(rows, tokens)
    splits = floor_power(min(device.processors * together // programs, inputs // (4 * codes)))
    return MmaTile(tokens, codes, stages, splits, warps, together, warp_groups)


def gemv_tile(rows: int, outputs: int, inputs: int, step: int) -> GemvTile:
    # One chunk a thread and a step; a row that is short leaves no thread idle.
    chunks = max(32, min(128, power_of_two(cdiv(inputs, step))))
    # x is held in registers: for more inputs a chunk, or more rows of x, fewer weight rows fit beside it.
    return GemvTile(outputs=1 if rows > 4 else 2 if rows > 2 or step > 64 else 4, chunks=chunks, warps=chunks // 32)


def gemm_tile(rows: int, outputs: int, inputs: int, step: int, dtype: torch.dtype, device: Device) -> GemmTile:
    if dtype == torch.float32:  # no tensor cores
        return GemmTile(rows=16, outputs=32, chunks=2 if step <= 64 else 1, splits=1, warps=4, stages=2)
    chunks = 4 if step <= 64 else 2
    if rows <= 16:
        tile_rows, tile_outputs = 16, 64
    elif rows <= 32:
        tile_rows, tile_outputs = 32, 64
    elif rows <= 64 or not device.warp_groups or step > 64:
        # A step of 128 codes, as a 1-bit plane needs, leaves no shared memory for larger tiles.
        tile_rows, tile_outputs = 64, 64
    else:
        tile_rows, tile_outputs = 128, 128
    tiles = cdiv(rows, tile_rows) * cdiv(outputs, tile_outputs)
    steps = cdiv(inputs, step * chunks)
    splits = max(1, min(8, 256 // tiles, steps // 4))
    stages = 3
    while stages > 1 and _shared_bytes(tile_rows, tile_outputs, chunks, step, stages) > device.shared_bytes:
        stages -= 1
    return GemmTile(tile_rows, tile_outputs, chunks, splits, 4 if tile_rows < 128 else 8, stages)


def _shared_bytes(rows: int, outputs: int, chunks: int, step: int, stages: int) -> int:
    """Not less than what a program of linear_gemm takes with 16-bit inputs: x and codes a stage, and the float tile."""
    return stages * chunks * (rows * step * 2 + outputs * 16 * 2) + outputs * chunks * 16 * 2


def dequantize_tile(bits: int) -> DequantizeTile:
    return DequantizeTile(outputs=8, chunks=16, warps=4)


def slab_rows(inputs: int, height: int, slabs: int = 1) -> int:
    """Rows of a float copy of about `slabs` times SLAB_ELEMENTS, whole tiles of `height` rows.

    And whole tiles of a matrix product where they fit: cuBLAS is three times slower where rows of its output are
    misaligned.
    """
    rows = slabs * SLAB_ELEMENTS // inputs
    whole = math.lcm(height, 256)
    return rows // whole * whole or max(1, rows // height) * height
