"""The linears' kernels, with the tiles that they would get."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.kernels import (
    _tuning,
    _turns,
    dequantize_gpu,
    linear_codes,
    linear_dot,
    linear_few,
    linear_gemm,
    linear_gemv,
    linear_mma,
    linear_wgmma,
)
from qcompile.kernels._tuning import Device
from qcompile.kernels._weight import Layout

U4, I8, I2, I3, U1 = "u4/g64/asym", "i8/row/sym", "i2/g64/sym", "i3/g64/sym", "u1/g64/sym"
FP8, NF4 = "fp8_e4m3/b128x128/sym", "nf4/g64/sym"


def cases(names: str, first: Any, *others: Any) -> pytest.MarkDecorator:
    """The first is tried on every GPU."""
    return pytest.mark.parametrize(
        names, [first, *(pytest.param(*other, marks=pytest.mark.widely) for other in others)]
    )


@pytest.fixture
def tensor_core_chip(chip: Device) -> Device:
    """Before 8.0 Triton has no tensor cores and no asynchronous copies, and what needs them is never chosen."""
    if not chip.tensor_cores:
        pytest.skip("is not chosen here")
    return chip


def reads(spec: str) -> dict[str, Any]:
    """Constants of a kernel that reads such a weight."""
    return {"W": Layout.of(spec), "EVEN": spec != I3}


def absent_of(spec: str) -> tuple[str, ...]:
    """What kernels that read such a weight do without."""
    return ("bias_ptr",) + ("table_ptr",) * (not Layout.of(spec).table) + ("zero_ptr",) * (spec != U4)


@cases("spec, rows", (U4, 1), (U4, 8), (I3, 1), (FP8, 1), (NF4, 4))
def test_gemv(compiled: Callable, assert_fits: Callable, spec: str, rows: int) -> None:
    tile = _tuning.gemv_tile(rows, 4096, 4096, 16 * Layout.of(spec).fields)
    sizes = {"ROWS": rows, "OUTPUTS": tile.outputs, "CHUNKS": tile.chunks, "ACTIVATION": "silu"}
    absent, types = absent_of(spec), {"x_ptr": "*i64"}
    assert_fits(compiled(linear_gemv._gemv, tile.warps, absent=absent, types=types, **reads(spec), **sizes))


@cases("spec, rows", (U4, 200), (U4, 16), (I3, 64), (FP8, 64), (NF4, 200))
def test_gemm(tensor_core_chip: Device, compiled: Callable, assert_fits: Callable, spec: str, rows: int) -> None:
    tile = _tuning.gemm_tile(rows, 4096, 4096, 16 * Layout.of(spec).fields, torch.bfloat16, tensor_core_chip)
    sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "CHUNKS": tile.chunks, "ACTIVATION": None}
    absent = absent_of(spec)
    assert_fits(compiled(linear_gemm._gemm, tile.warps, tile.stages, absent, **reads(spec), **sizes))


def test_finish(compiled: Callable, assert_fits: Callable) -> None:
    assert_fits(compiled(linear_gemm._finish, 4, SPLITS=4, ACTIVATION="gelu", BLOCK=linear_gemm.FINISH_BLOCK))


@pytest.mark.parametrize("spec", [U4, FP8, NF4])
def test_dequantize(compiled: Callable, assert_fits: Callable, spec: str) -> None:
    tile = _tuning.dequantize_tile(4)
    sizes = {"W": Layout.of(spec), "EVEN": True, "BLOCK_N": tile.outputs, "CHUNKS": tile.chunks}
    assert_fits(compiled(dequantize_gpu._dequantize, tile.warps, absent=absent_of(spec), **sizes))


@cases(
    "spec, rows, outputs, inputs, around",
    (U4, 1, 4096, 4096, False),
    (I2, 2, 4096, 4096, False),
    (I3, 1, 4096, 14336, False),
    (I8, 1, 4096, 14336, False),
    (U4, 1, 4096, 14336, False),
    (U4, 2, 4096, 4096, True),
    (U4, 2, 28672, 4096, True),
    (U1, 1, 28672, 4096, True),
)
def test_dot(
    tensor_core_chip: Device,
    compiled: Callable,
    assert_fits: Callable,
    spec: str,
    rows: int,
    outputs: int,
    inputs: int,
    around: bool,
) -> None:
    """Alone, and with all that may stand `around` it: norm, gate and residual."""
    layout = Layout.of(spec)
    tile = _tuning.dot_tile(rows, outputs, inputs, 16 * layout.fields, layout.bits, tensor_core_chip)
    groups = inputs // layout.group if layout.group else 1
    sizes = {"ROWS": rows, "OUTPUTS": tile.outputs, "SPLIT": tile.split, "STEPS": tile.steps, "AHEAD": tile.ahead}
    sizes |= {"WORDS": tile.words, "LATE": tile.late, "K": inputs, "DATA_STRIDE": inputs * layout.bits // 128}
    sizes |= {"SCALE_STRIDE": groups, "ZERO_STRIDE": groups}
    sizes |= {"ACTIVATION": "silu", "GATED": around, "NORM": around, "OFFSET": 0.0}
    absent = absent_of(spec) + (() if around else ("norm_ptr", "residual_ptr"))
    types = {"x_ptr": "*i64", "norm_ptr": "*i64"}
    for copied in (False, True) if rows == 1 and layout.bits < 8 else (False,):
        kinds = {"W": layout, "EVEN": True, "COPIED": copied}
        assert_fits(compiled(linear_dot._dot, tile.warps, absent=absent, types=types, **kinds, **sizes))


@cases("spec, rows", (U4, 4), (U4, 16), (I2, 8), (I3, 8), (I8, 8))
def test_few(tensor_core_chip: Device, compiled: Callable, assert_fits: Callable, spec: str, rows: int) -> None:
    tile = _tuning.few_tile(rows, 16384, 4096, Layout.of(spec).bits, tensor_core_chip)
    sizes = {"TOKENS": tile.tokens, "CODES": tile.codes, "STAGES": tile.stages, "SPLIT": tile.split}
    absent, registers = absent_of(spec), min(255, 2048 // (tile.warps * tile.together))
    sizes |= {"registers": registers, "ACTIVATION": "silu"}
    for gated, copied in ((False, True), (True, False)) if rows == 4 else ((False, spec == U4),):
        kinds = {"GATED": gated, "COPIED": copied}
        assert_fits(compiled(linear_few._few, tile.warps, absent=absent, **kinds, **reads(spec), **sizes))


@cases(
    "spec, rows",
    (U4, 16),
    *((U4, rows) for rows in (30, 40, 48, 64, 72, 80, 112, 160, 256, 300)),
    (I2, 16),
    (I3, 200),
    (I8, 64),
    (I8, 160),
)
def test_mma(
    tensor_core_chip: Device,
    compiled: Callable,
    assert_fits: Callable,
    assert_overlaps: Callable,
    spec: str,
    rows: int,
) -> None:
    tile = _tuning.mma_tile(rows, 16384, 4096, Layout.of(spec).bits, tensor_core_chip)
    sizes = {"TOKENS": tile.tokens, "CODES": tile.codes, "STAGES": tile.stages, "WARP_GROUPS": tile.warp_groups}
    absent, registers = absent_of(spec), min(255, 2048 // (tile.warps * tile.together))
    sizes |= {"registers": registers, "ACTIVATION": "silu"}
    for gated, copied in ((False, False), (True, rows == 16)) if rows in (16, 160) else ((False, rows < 100),):
        kinds = {"GATED": gated, "COPIED": copied and spec == U4}
        kernel = compiled(linear_mma._mma, tile.warps, absent=absent, **kinds, **reads(spec), **sizes)
        assert_fits(kernel)
        assert_overlaps(kernel)


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize(
    ("spec", "tokens", "made", "stack"),
    [
        *((U4, 128, "sums", 32), (U4, 144, "parts", 32), (U4, 192, "gated", 32), (I3, 128, "sums", 32)),
        (U4, 200, "parts", 128),  # with Triton 3.9, also in its steps; with 3.6, on which it was timed, nothing
        *((U4, 256, "sums", 256), (U4, 256, "gated", 256), (U4, 264, "parts", 1024)),
    ],
)
def test_wgmma(
    chip: Device,
    compiled: Callable,
    assert_fits: Callable,
    assert_overlaps: Callable,
    spec: str,
    tokens: int,
    made: str,
    stack: int,
) -> None:
    """The widest tiles have most of their registers for sums, and keep in memory what they need once a tile."""
    layout = Layout.of(spec)
    stages = _turns.wgmma_stages(tokens, layout.bits, chip)
    sizes = {"TOKENS": tokens, "CODES": _turns.WGMMA_CODES, "STAGES": stages, "ACTIVATION": "silu"}
    sizes |= {
        "GATED": made == "gated",
        "PIECE": max(linear_wgmma.PIECE, 16 * layout.fields),
        "registers": linear_wgmma.LAUNCHED,
    }
    sizes |= {"MULTIPLYING": linear_wgmma.MULTIPLYING, "FETCHING": linear_wgmma.FETCHING}
    absent = absent_of(spec) + ("parts_ptr",) * (made != "parts")
    kernel = compiled(linear_wgmma._wgmma, 4, absent=absent, **reads(spec), **sizes)
    assert_fits(kernel, stack)
    assert_overlaps(kernel)


@pytest.mark.parametrize("gpu", [90], indirect=True)
@pytest.mark.parametrize(("rows", "inputs"), [(32, 4096), (32, 14336), (512, 4096), (2048, 4096)])
@pytest.mark.parametrize("element", ["i8", "fp8e4nv"])
def test_codes(
    chip: Device,
    compiled: Callable,
    assert_fits: Callable,
    assert_overlaps: Callable,
    described: Callable,
    element: str,
    rows: int,
    inputs: int,
) -> None:
    """Products of floats keep in memory what they need once a tile, where Triton 3.9 compiles them."""
    integers = element == "i8"
    tile = _turns.product_tile(rows, 4096, inputs, integers, chip)
    types: dict[str, str] = {"step_ptr": "*fp32"}
    types |= {"x": described(element, tile.at_once, 128), "w": described(element, 64, 128)}
    sums = "*i32" if integers else "*fp32"
    types["out"] = sums if tile.splits > 1 else described("bf16", tile.at_once, 64)
    sizes = {"BLOCKS": tile.tokens // tile.at_once, "STAGES": tile.stages, "SPLIT": tile.splits > 1}
    sizes |= {"step_stride": 1, "scale_stride": 1, "registers": linear_codes.REGISTERS}
    absent, activation = ((), "silu") if tile.splits == 1 else (("bias_ptr",), None)
    kernel = compiled(linear_codes._products, 4, absent=absent, types=types, ACTIVATION=activation, **sizes)
    assert_fits(kernel, 32 if integers else 96)
    assert_overlaps(kernel)
