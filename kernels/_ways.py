"""The ways that a linear can take on a GPU, by name and tile; by formula, and those that are worth a measurement.

Tiles to measure lie around the formula's: other numbers of programs beside one another, of warps and of codes in a
step, half and twice as many parts of the inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from qcompile.kernels import _gluon, _tuning, _turns
from qcompile.kernels._tiles import cdiv, power_of_two
from qcompile.kernels._tuning import DequantizeTile, Device, DotTile, FewTile, GemmTile, GemvTile, MmaTile
from qcompile.kernels._turns import WgmmaTile
from qcompile.kernels._weight import Layout
from qcompile.kernels.linear_few import can_sum

TILES: dict[str, Any] = {
    "dot": DotTile,
    "few": FewTile,
    "mma": MmaTile,
    "wgmma": WgmmaTile,
    "gemv": GemvTile,
    "gemm": GemmTile,
    "dequantize": DequantizeTile,
}
Tile = DotTile | FewTile | MmaTile | WgmmaTile | GemvTile | GemmTile | DequantizeTile

# Ways that take no more rows than this.
MOST_ROWS = {"dot": 2, "gemv": 8}
# Ways that need integers.
OF_INTEGERS = ("dot", "few", "mma", "wgmma")
# What of a tile need not be a power of two.
ANY_COUNT = ("steps", "ahead", "together", "tokens", "stages", "splits", "last", "parts")
# Rows from which a float copy of the weight may pay, and up to which tiles that unpack codes again for other rows may.
COPIED_FROM, UNPACKED_TO = 128, 1024


class Product(NamedTuple):
    """x (rows, inputs) in `dtype` times W (outputs, inputs).T, W by `spec`; `integers`: do Gluon's kernels take it?"""

    spec: str
    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype
    integers: bool


class Choice(NamedTuple):
    way: str
    tile: Tile


def product_of(spec: str, rows: int, outputs: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> Product:
    """The product of an x that is aligned."""
    x = torch.empty(1, inputs, dtype=dtype, device="meta")
    return Product(spec, rows, outputs, inputs, dtype, _gluon.refuses(x, Layout.of(spec)) is None)


def by_formula(product: Product, device: Device) -> Choice:
    layout = Layout.of(product.spec)
    sums = can_sum(product.dtype, layout)
    way = _tuning.way(product.rows, product.integers, 16 * layout.fields, device, sums, product.outputs)
    return Choice(way, tile_of(way, product, device))


def tile_of(way: str, product: Product, device: Device) -> Tile:
    """The formula's tile for this way."""
    layout, (_, rows, outputs, inputs, dtype, _) = Layout.of(product.spec), product
    bits, step = layout.bits, 16 * layout.fields
    if way == "dot":
        return _tuning.dot_tile(rows, outputs, inputs, step, bits, device)
    if way == "few":
        return _tuning.few_tile(rows, outputs, inputs, bits, device)
    if way == "mma":
        return _tuning.mma_tile(rows, outputs, inputs, bits, device)
    if way == "wgmma":
        return _turns.wgmma_tile(rows, outputs, inputs, bits, device)
    if way == "gemv":
        return _tuning.gemv_tile(rows, outputs, inputs, step)
    if way == "gemm":
        return _tuning.gemm_tile(rows, outputs, inputs, step, dtype, device)
    return _tuning.dequantize_tile(bits)


def candidates(product: Product, device: Device) -> list[Choice]:
    """What may be the fastest, the formula's choice first."""
    formula = by_formula(product, device)
    ways = [way for way in TILES if way != formula.way and _competes(way, product, formula.way, device)]
    found = [formula]
    for way in [formula.way, *ways]:
        first = tile_of(way, product, device)
        found += [Choice(way, tile) for tile in [first, *_AROUND[way](first, product, device)]]
    return [choice for choice in dict.fromkeys(found) if fits(choice, product, device)]


def _competes(way: str, product: Product, formula: str, device: Device) -> bool:
    rows = product.rows
    if formula == "dot" or way == "dot":  # which linears take what is around them is decided before rows are known
        return False
    if way == "few":
        return product.integers and device.tensor_cores and rows <= 16
    if way == "mma":
        return product.integers and device.tensor_cores and 8 < rows <= UNPACKED_TO
    if way == "wgmma":
        return product.integers and device.major == 9 and rows > 64
    if way == "gemv":
        return not product.integers
    if way == "gemm":
        return 4 < rows <= UNPACKED_TO and not (product.integers and device.warp_groups)
    return rows >= COPIED_FROM


def fits(choice: Choice, product: Product, device: Device) -> bool:
    """Can this device run it? Registers aside, which the compiler knows."""
    way, tile = choice
    layout, shared = Layout.of(product.spec), device.shared_bytes
    step = 16 * layout.fields
    if way not in TILES or product.rows > MOST_ROWS.get(way, product.rows):
        return False
    if way in OF_INTEGERS and not (product.integers and device.tensor_cores):
        return False
    if way == "wgmma" and device.major != 9:
        return False
    if way == "few" and not can_sum(product.dtype, layout):
        return False
    if (way == "dot") != (by_formula(product, device).way == "dot"):
        return False
    counts = {name: count for name, count in vars(tile).items() if type(count) is int}
    if not all(0 < count <= 1024 for count in counts.values()) or counts.get("warps", 4) > 16:
        return False
    if any(count != power_of_two(count) for name, count in counts.items() if name not in ANY_COUNT):
        return False
    if isinstance(tile, DotTile):
        held = tile.held(product.inputs, step, layout.bits)
        return tile.split <= tile.warps and tile.ahead <= tile.steps and held <= shared - (16 << 10)
    if isinstance(tile, FewTile):
        a_stage = tile.stage_bytes(layout.bits)
        # What is unpacked at once is of whole chunks; a part has a step at least.
        whole = tile.codes >= max(64, step) and tile.split <= tile.warps and tile.stages >= 2
        return whole and tile.parts * tile.split * tile.codes <= product.inputs and tile.stages * a_stage <= shared
    if isinstance(tile, MmaTile):
        a_stage = tile.stage_bytes(layout.bits)
        whole = tile.codes >= max(64, step) and tile.stages >= (3 if tile.warp_groups else 2) and tile.warps % 4 == 0
        return whole and tile.splits * tile.codes <= product.inputs and tile.stages * a_stage <= shared
    if isinstance(tile, WgmmaTile):
        whole = tile.tokens % 8 == 0 and tile.tokens <= 264 and tile.shares * _turns.WGMMA_CODES <= product.inputs
        return whole and 2 <= tile.stages <= _turns.wgmma_stages(tile.tokens, layout.bits, device)
    if isinstance(tile, GemmTile):
        a_stage = tile.chunks * (tile.rows * step * 2 + tile.outputs * 16 * 2)
        return min(tile.rows, tile.outputs) >= 16 and tile.stages * a_stage <= shared
    return True


# Tiles around a formula's


def _dot_tiles(tile: DotTile, product: Product, device: Device) -> Iterator[DotTile]:
    for outputs, (split, warps) in itertools.product((1, 2, 4), ((1, 1), (1, 2), (2, 2), (4, 2), (2, 4))):
        near = replace(tile, outputs=max(1, tile.outputs * outputs // 2), split=max(1, tile.split * split // 2))
        yield replace(near, warps=min(16, max(near.split, tile.warps * warps // 2)))
    if tile.steps == 1 and tile.outputs < 16:
        yield replace(tile, steps=4, ahead=2)
    elif tile.steps > 1:
        yield replace(tile, steps=1, ahead=1)


def _few_tiles(tile: FewTile, product: Product, device: Device) -> Iterator[FewTile]:
    for codes, split, together in itertools.product((128, 256), (2, 4), (3, 4)):
        near = replace(tile, codes=codes, split=split, together=together)
        if (stages := min(4, device.shared_bytes // (together * near.stage_bytes(_bits(product))))) >= 2:
            programs = cdiv(product.outputs, near.rows) * cdiv(product.rows, near.tokens)
            for parts in _parts(programs, product.inputs // (2 * split * codes), device.processors * together):
                yield replace(near, stages=stages, parts=parts)


def _mma_tiles(tile: MmaTile, product: Product, device: Device) -> Iterator[MmaTile]:
    for (warps, together), codes in itertools.product(_programs(tile), (64, 128, 256)):
        if codes not in (tile.codes // 2, tile.codes, tile.codes * 2):
            continue
        near = replace(tile, codes=codes, warps=warps, together=together)
        if (stages := min(4, device.shared_bytes // (together * near.stage_bytes(_bits(product))))) >= 2:
            programs = cdiv(product.outputs, 16 * warps) * cdiv(product.rows, tile.tokens)
            for splits in _parts(programs, product.inputs // (3 * codes), device.processors * together):
                yield replace(near, stages=stages, splits=splits)


def _wgmma_tiles(tile: WgmmaTile, product: Product, device: Device) -> Iterator[WgmmaTile]:
    for splits in (1, 2, 4):
        yield replace(tile, splits=splits, last=1)
        yield replace(tile, splits=1, last=splits)


def _programs(tile: MmaTile) -> list[tuple[int, int]]:
    """Warps of a program, and programs beside one another, that have the registers."""
    if tile.tokens <= 48:
        return [(4, 4), (4, 3), (4, 2), (8, 2), (8, 1)]
    if tile.tokens <= 96:
        return [(4, 2), (8, 2), (8, 1), (16, 1)]
    return [(8, 1), (16, 1)] if tile.tokens <= 128 else [(8, 1)]


def _gemv_tiles(tile: GemvTile, product: Product, device: Device) -> Iterator[GemvTile]:
    for outputs, chunks in itertools.product((1, 2, 4), (32, 64, 128)):
        if outputs * power_of_two(product.rows) <= 8:
            yield replace(tile, outputs=outputs, chunks=chunks, warps=chunks // 32)


def _gemm_tiles(tile: GemmTile, product: Product, device: Device) -> Iterator[GemmTile]:
    if product.dtype == torch.float32:
        return
    for outputs, warps, splits in itertools.product((1, 2, 4), (4, 8), (1, 2, 4)):
        wide = max(32, tile.outputs * outputs // 2)
        yield replace(tile, outputs=wide, warps=warps, splits=max(1, tile.splits * splits // 2))


def _dequantize_tiles(tile: DequantizeTile, product: Product, device: Device) -> Iterator[DequantizeTile]:
    """A wider product of few rows gives all processors work, a narrower copy stays in the cache."""
    for slabs in (2, 4, 8):
        if (slabs // 2) * _tuning.SLAB_ELEMENTS < product.outputs * product.inputs:
            yield replace(tile, slabs=slabs)


_AROUND: dict[str, Any] = {
    "dot": _dot_tiles,
    "few": _few_tiles,
    "mma": _mma_tiles,
    "wgmma": _wgmma_tiles,
    "gemv": _gemv_tiles,
    "gemm": _gemm_tiles,
    "dequantize": _dequantize_tiles,
}


def _parts(programs: int, most: int, room: int) -> list[int]:
    """Numbers of parts of the inputs that leave a program's worth of them, and fill the room for programs at most."""
    return [parts for parts in (1, 2, 4, 8) if parts == 1 or (parts <= most and parts * programs <= room * 1.1)][-3:]


def _bits(product: Product) -> int:
    return Layout.of(product.spec).bits
