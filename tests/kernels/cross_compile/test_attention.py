"""Attention's kernels, for 32 query heads over 8 of 128 columns, 71 over one of 64, and 16 over 16 of 256."""

from collections.abc import Callable
from typing import Any

import pytest

from qcompile.kernels import (
    _attention,
    _attention_parts,
    _attention_tiles,
    attention_codes,
    attention_decode,
    attention_into_cache,
    attention_prompt,
    attention_warps,
    attention_warps_into_cache,
    attention_wgmma,
)
from qcompile.kernels._attention_tiles import WarpsTile
from qcompile.kernels._tiles import power_of_two
from qcompile.kernels._tuning import Device

widely = pytest.mark.widely
heads = pytest.mark.parametrize(
    ("pairs", "rows", "width"),
    [(8, 4, 128), pytest.param(1, 71, 64, marks=widely), pytest.param(512, 1, 256, marks=widely)],
)


def sizes_of(width: int) -> dict[str, int]:
    return {"D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width}


def absent_of(width: int, tile: _attention_tiles.AttentionTile | None = None) -> tuple[str, ...]:
    """The widest has a soft-cap."""
    alone = tile is None or tile.splits == 1 or tile.cluster
    return ("softcap",) * (width < 256) + ("sums_ptr", "parts_ptr") * alone


def steps_of(tile: _attention_tiles.AttentionTile) -> dict[str, Any]:
    return {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "MASK_ROWS": 1, "SCAN": _attention.SCAN_ELEMENTS, "EARLY": True}


def parts_of(tile: _attention_tiles.AttentionTile, rows: int, keys: int) -> dict[str, Any]:
    parts = {"BESIDE": tile.beside, "SPLITS": tile.splits, "CLUSTER": tile.cluster}
    return parts | {
        "ROWS": rows,
        "IN_ONE": keys <= tile.keys * tile.splits,
        "FETCHED": _attention.FETCHED,
        "mask_column": 1,
    }


@heads
def test_decode(chip: Device, compiled: Callable, assert_fits: Callable, pairs: int, rows: int, width: int) -> None:
    tile = _attention_tiles.attention_tile(pairs, rows, 8192, width, 2, chip)
    around = parts_of(tile, min(tile.rows, power_of_two(rows)), 8192) | {"k_column": 1, "v_column": 1}
    absent, constants = absent_of(width, tile), sizes_of(width) | steps_of(tile) | around
    kernel = compiled(attention_decode._split, tile.warps, tile.stages, absent, **constants)
    assert_fits(kernel)
    if chip.major == 9 and width == 128:  # keys and values of several steps are fetched ahead
        assert kernel.metadata.shared > 2 * tile.keys * 2 * width * 2


@heads
def test_codes(
    gpu: int, chip: Device, compiled: Callable, assert_fits: Callable, pairs: int, rows: int, width: int
) -> None:
    tile = _attention_tiles.codes_tile(pairs, rows, 8192, width, 2, chip)
    constants = sizes_of(width) | steps_of(tile) | {"mask_column": 1}
    types = {"k_ptr": "*i32", "v_ptr": "*i32"}
    for integers in (True, False) if gpu >= 89 else (True,):
        kernel = attention_codes._split_codes
        absent = absent_of(width, tile)
        assert_fits(compiled(kernel, tile.warps, 1, absent, types=types, IS_INTEGER=integers, **constants))


@pytest.mark.parametrize("width", [128, pytest.param(64, marks=widely), pytest.param(256, marks=widely)])
def test_prompt(chip: Device, compiled: Callable, assert_fits: Callable, width: int) -> None:
    if (tile := _attention_tiles.prompt_tile(width, 2, chip)) is None:
        pytest.skip("has no tile here")
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "mask_column": 1}
    absent, kernel = absent_of(width), attention_prompt._prompt
    assert_fits(compiled(kernel, tile.warps, tile.stages, absent, BLOCKS=64, **sizes_of(width), **blocks))
    assert_fits(compiled(attention_prompt._survey, 4, **blocks))


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize(
    ("width", "mask", "blocks"), [(128, "*i1", 16), (128, "*bf16", 1), (64, "*i1", 1024), (64, "*fp32", 16)]
)
def test_wgmma(
    compiled: Callable,
    assert_fits: Callable,
    assert_overlaps: Callable,
    described: Callable,
    width: int,
    mask: str,
    blocks: int,
) -> None:
    keys = described("bf16", attention_wgmma.KEYS, width)
    types = {"k": keys, "v": keys, "survey_ptr": "*i8", "mask_ptr": mask, "scale": "fp32"}
    sizes = {"D": width, "BLOCKS": blocks, "mask_column": 1, "registers": attention_wgmma.REGISTERS}
    sizes |= {"ROWS": attention_wgmma.ROWS, "KEYS": attention_wgmma.KEYS, "STAGES": attention_wgmma.STAGES}
    kernel = compiled(attention_wgmma._attend, 4, types=types, **sizes)
    assert_fits(kernel)
    assert_overlaps(kernel)


@pytest.mark.parametrize("batch", [1, 16])
def test_into_cache(
    gpu: int, chip: Device, compiled: Callable, assert_fits: Callable, told: Callable, batch: int
) -> None:
    tile = _attention_tiles.attention_tile(8 * batch, 4, 1024, 128, 2, chip)
    sizes = sizes_of(128) | {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "SCAN": 1024, "EARLY": True}
    constants = sizes | parts_of(tile, 4, 1024)
    kernel = compiled(attention_into_cache._step, tile.warps, tile.stages, absent_of(128, tile), **constants)
    assert_fits(kernel)
    assert tile.cluster == (gpu == 90 and batch == 1)
    if tile.cluster and (code := told(kernel, "-sass")):
        assert code.count("UCGABAR_WAIT") == 2


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize(("pairs", "keys"), [(8, 1024), (8, 8192), (128, 8192)])
def test_warps(chip: Device, compiled: Callable, assert_fits: Callable, pairs: int, keys: int) -> None:
    tile = _attention_tiles.warps_tile(pairs, keys, chip)
    assert tile.cluster == (keys == 1024)
    constants = attention_warps.constants_of(tile, 4, keys, 128) | {"K_ROW": 128, "V_ROW": 128, "mask_column": 1}
    absent = ("sums_ptr", "parts_ptr") * (tile.splits == 1 or tile.cluster)
    for kernel in (attention_warps._attend, attention_warps_into_cache._step):
        assert_fits(compiled(kernel, absent=absent, **constants))


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize(
    ("tile", "rows", "keys", "row", "absent"),
    [
        (WarpsTile(2, True, False, 1), 1, 200, 128, ("mask_ptr",)),
        (WarpsTile(4, True, False, 1), 4, 500, 1024, ()),
        (WarpsTile(8, True, False, 1, 3), 8, 5001, 128, ()),
        (WarpsTile(1, False, False, 4, 2), 8, 5001, 128, ("mask_ptr",)),
        (WarpsTile(4, False, True, 4, 2), 3, 5001, 2048, ()),
    ],
)
def test_warps_of_all_kinds(
    compiled: Callable, assert_fits: Callable, tile: WarpsTile, rows: int, keys: int, row: int, absent: tuple[str, ...]
) -> None:
    """Clusters of few programs and in several steps, rows that are no power of two, caches whose rows lie apart."""
    constants = attention_warps.constants_of(tile, rows, keys, 128) | {"K_ROW": row, "V_ROW": row}
    absent += ("sums_ptr", "parts_ptr") * (tile.splits == 1 or tile.cluster)
    for kernel in (attention_warps._attend, attention_warps_into_cache._step):
        assert_fits(compiled(kernel, absent=absent, **constants))


def test_combine(compiled: Callable, assert_fits: Callable) -> None:
    assert_fits(compiled(_attention_parts._combine, 1, DV=128, BLOCK_DV=_attention_parts.COLUMNS, SPLITS=64))
