"""Times other tiles and ways of GPU linears: `python -m benchmarks.sweep_gpu --out FOLDER`, some minutes on one H100.

1. compile  all that is timed, in parallel processes, so that sweep finds it in Triton's cache
2. sweep    tiles to fill kernels/_tuning.py with; the best three of each, and the rest in the JSON

How times are taken is said in kernels_gpu.py.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks._gpu import Report, Row
from benchmarks.kernels_gpu import (
    SHAPES,
    Part,
    compile_ahead,
    copies_for,
    median_us,
    random_x,
    raw_weights,
    run,
    weight_bytes,
)
from qcompile.kernels import _tuning, linear_cuda, linear_dot
from qcompile.kernels._tuning import DotTile, FewTile, GemmTile, MmaTile
from qcompile.kernels._weight import Weight
from qcompile.kernels.linear_dot import Around, dot
from qcompile.kernels.linear_few import few
from qcompile.kernels.linear_gemm import gemm
from qcompile.kernels.linear_mma import mma
from qcompile.quant.spec import QSpec

SWEPT_BY_DOT = ("u4/g64/asym", "i4/g128/sym", "i8/g64/sym", "u3/g64/asym", "u2/g64/asym", "u1/g64/asym")
SWEPT_BY_FEW = ("u4/g64/asym", "i8/g64/sym")
SWEPT_BY_MMA = ("u4/g64/asym", "i8/g64/sym")
MMA_ROWS = (16, 32, 64, 96, 128, 256)
SWEPT_BY_GEMM = "i4/g128/sym"


def plain_dot(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None, tile: DotTile) -> Tensor:
    return dot(x, weight, bias, Around(activation=activation), tile)


# Way → the kernel and its tiles.
KERNELS: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "dot": (plain_dot, DotTile),
    "few": (few, FewTile),
    "mma": (mma, MmaTile),
    "gemm": (gemm, GemmTile),
}

Run = Callable[[Tensor, Weight], Tensor]
Tile = DotTile | FewTile | MmaTile | GemmTile


def main() -> None:
    run(PARTS, __doc__, "sweep_gpu", "GPU linears: which tiles are fastest?", "kernels-sweep")


def part_compile(report: Report, deadline: float) -> None:
    compile_ahead(warm, list(swept_cases()), report, deadline)


def swept_cases() -> Iterator[Row]:
    """What sweep launches."""
    for spec, rows, name in itertools.product(SWEPT_BY_DOT, (1, 2), ("o", "down")):
        for tile in dot_tiles(spec):
            yield {"way": "dot", "spec": spec, "rows": rows, "shape": name, "tile": vars(tile)}
    for spec in SWEPT_BY_FEW:
        for tile in unlike(few_tiles(spec, 8), "parts"):
            yield {"way": "few", "spec": spec, "rows": 8, "shape": "o", "tile": vars(tile)}
    for spec, rows in itertools.product(SWEPT_BY_MMA, MMA_ROWS):
        for tile in unlike(mma_tiles(spec, rows), "splits"):
            yield {"way": "mma", "spec": spec, "rows": rows, "shape": "o", "tile": vars(tile)}
    for rows, name in itertools.product((16, 64, 256), ("o", "down")):
        for tile in unlike(gemm_tiles(rows), "splits"):
            yield {"way": "gemm", "spec": SWEPT_BY_GEMM, "rows": rows, "shape": name, "tile": vars(tile)}


def unlike(tiles: Iterable[Tile], count: str) -> list[Tile]:
    """Those that are compiled anew: a count of programs is no constant of a kernel, but for whether it is 1."""
    return list({str({**vars(tile), count: vars(tile)[count] > 1}): tile for tile in tiles}.values())


def warm(case: Row) -> Row:
    """The case with why it failed, or None."""
    try:
        n, k = SHAPES[case["shape"]]
        weight = Weight.of(*raw_weights(case["spec"], n, k, 1)[0], case["spec"], k)
        kernel, tile = KERNELS[case["way"]]
        kernel(random_x(case["rows"], k), weight, None, None, tile(**case["tile"]))
        torch.cuda.synchronize()
        return {**case, "why": None}
    except Exception as failure:
        return {**case, "why": f"{type(failure).__name__}: {failure}"[-600:]}


def part_sweep(report: Report, deadline: float) -> None:
    for kind, spec, name, rows, runs in sweeps():
        n, k = SHAPES[name]
        nbytes = weight_bytes(spec, n, k)
        weights = [Weight.of(*w, spec, k) for w in raw_weights(spec, n, k, copies_for(nbytes))]
        x, found = random_x(rows, k), []
        for label, one in runs.items():
            if time.time() > deadline:
                report.fail("sweep", f"out of time in {kind} {spec} {name} {rows}")
                return
            try:
                us = median_us([partial(one, x, w) for w in weights])
            except Exception as failure:
                report.fail("sweep", f"{kind} {spec} {name} {rows} {label}: {failure}"[:300])
                continue
            found.append(
                {"kind": kind, "spec": spec, "shape": name, "rows": rows, "us": us, "gbps": nbytes / us / 1e3,
                 "tile": label}
            )  # fmt: skip
        found.sort(key=lambda row: row["us"])
        for row in found[:3]:
            report.add("sweep", **row)
        for row in found:
            report.detail("sweep", **row)


def sweeps() -> Iterator[tuple[str, str, str, int, dict[str, Run]]]:
    """(kind, spec, shape, rows, runs by label) to compare."""
    names = ("qkv", "o", "gate_up", "down")
    for rows, spec, name in itertools.product((1, 2), SWEPT_BY_DOT, names):
        yield "dot", spec, name, rows, dict(by("dot", tile) for tile in dot_tiles(spec))
    for spec, name in itertools.product(SWEPT_BY_FEW, names):
        yield "few", spec, name, 8, dict(by("few", tile) for tile in few_tiles(spec, 8))
    for rows, spec, name in itertools.product(MMA_ROWS, SWEPT_BY_MMA, names):
        yield "mma", spec, name, rows, dict(by("mma", tile) for tile in mma_tiles(spec, rows))
    for rows, name in itertools.product((4, 16, 64, 256), ("o", "gate_up", "down")):
        tiled = [*(by("gemm", tile) for tile in gemm_tiles(rows)), by_slab(_tuning.SLAB_ELEMENTS)]
        yield "gemm", SWEPT_BY_GEMM, name, rows, dict(tiled)
    # Does starting early (programmatic dependent launch) pay?
    for name in ("o", "gate_up", "down"):
        label, early = by("dot", _tuning.dot_tile(1, *SHAPES[name], 32, 4, _tuning.Device()))
        both = {f"with, {label}": early, f"without, {label}": without_pdl(early)}
        yield "dot and PDL", SWEPT_BY_DOT[0], name, 1, both
    # Does the slab of the float copy stay in the cache?
    for rows in (256, 2048):
        yield "slab", SWEPT_BY_GEMM, "gate_up", rows, dict(map(by_slab, (4 << 20, 8 << 20, 16 << 20, 1 << 40)))


def by(way: str, tile: Tile) -> tuple[str, Run]:
    kernel, _ = KERNELS[way]
    label = " ".join(f"{key}={value}" for key, value in vars(tile).items())
    return label, lambda x, weight: kernel(x, weight, None, None, tile)


def by_slab(elements: int) -> tuple[str, Run]:
    def multiply(x: Tensor, weight: Weight) -> Tensor:
        with mock.patch.object(_tuning, "SLAB_ELEMENTS", elements):
            return linear_cuda.dequantize_and_multiply(x, weight, None, None)

    return f"dequantize, slabs of {elements >> 20} Mi", multiply


def without_pdl(early: Run) -> Run:
    def without(x: Tensor, weight: Weight) -> Tensor:
        with mock.patch.object(linear_dot, "dependent_launch", lambda x: False):
            return early(x, weight)

    return without


# Tiles to try


def dot_tiles(spec: str) -> list[DotTile]:
    splits = (2, 4, 8) if QSpec.parse(spec).element.bits in (4, 8) else (1, 2, 4)
    tiles = [
        DotTile(outputs, split, split * by) for split, by, outputs in itertools.product(splits, (1, 2), (4, 8, 16))
    ]
    # A thread has the registers for so many rows.
    tiles = [tile for tile in tiles if tile.warps <= 8 and tile.outputs * tile.split // tile.warps <= 16]
    return tiles + [replace(tile, steps=4, ahead=2) for tile in tiles if tile.outputs < 16]


def few_tiles(spec: str, rows: int) -> list[FewTile]:
    """What shared memory holds."""
    bits, room = QSpec.parse(spec).element.bits, _tuning.Device.shared_bytes
    tile = _tuning.few_tile(rows, 4096, 4096, bits, _tuning.Device())
    sizes = itertools.product((128, 256), (3, 4), (1, 2, 4), (2, 4), (2, 3, 4))
    tiles = [replace(tile, codes=c, stages=n, parts=p, split=s, together=t) for c, n, p, s, t in sizes]
    return [t for t in tiles if t.together * t.stages * t.split * t.codes * (t.rows * bits // 8 + 2 * t.tokens) <= room]


def mma_tiles(spec: str, rows: int) -> list[MmaTile]:
    """What shared memory and registers hold."""
    bits, room = QSpec.parse(spec).element.bits, _tuning.Device.shared_bytes
    tile = _tuning.mma_tile(rows, 4096, 4096, bits, _tuning.Device())
    programs = ((4, 4), (4, 3), (4, 2), (8, 2), (8, 1), (16, 1))
    sizes = itertools.product((64, 128, 256), (3, 4), (1, 2, 4, 8), programs)
    tiles = [replace(tile, codes=c, stages=n, splits=s, warps=w, together=t) for c, n, s, (w, t) in sizes]
    tiles = [t for t in tiles if t.tokens <= (32 if t.warps * t.together > 8 else 64 if t.warps == 4 else 512)]
    return [t for t in tiles if t.together * t.stages * t.codes * (2 * t.warps * bits + 2 * t.tokens) <= room]


def gemm_tiles(rows: int) -> list[GemmTile]:
    if rows <= 16:
        shapes = ((16, 32, 4, 4, 3), (16, 64, 4, 4, 3), (16, 64, 4, 4, 5), (16, 64, 8, 4, 3), (16, 128, 4, 4, 3))
        return [GemmTile(m, n, c, s, w, g) for (m, n, c, w, g), s in itertools.product(shapes, (1, 2, 4, 8))]
    if rows <= 64:
        shapes = ((64, 64, 4, 4, 3), (64, 128, 4, 4, 3), (64, 128, 4, 8, 3), (64, 64, 4, 4, 4), (64, 256, 4, 8, 3))
        return [GemmTile(m, n, c, s, w, g) for (m, n, c, w, g), s in itertools.product(shapes, (1, 2, 4))]
    shapes = ((128, 128, 4, 8, 3), (128, 128, 4, 4, 3), (128, 256, 4, 8, 3), (256, 128, 4, 8, 3), (64, 256, 4, 8, 3))
    return [GemmTile(m, n, c, s, w, g) for (m, n, c, w, g), s in itertools.product(shapes, (1, 2))]


PARTS: dict[str, Part] = {"compile": part_compile, "sweep": part_sweep}


if __name__ == "__main__":
    main()
