"""Every Triton kernel, with the tiles it would get, compiles for every GPU generation without a GPU.

Shared memory must fit, and no kernel may keep more than a few bytes of its registers in memory. One representative
signature a kernel and GPU.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from qcompile.kernels import (
    _attention,
    _attention_tiles,
    _tuning,
    attention_codes,
    attention_decode,
    attention_into_cache,
    attention_prompt,
    dequantize_gpu,
    draw,
    gated_act,
    gated_codes,
    linear_codes,
    linear_dot,
    linear_few,
    linear_gemm,
    linear_gemv,
    linear_mma,
    linear_wgmma,
    norm,
    rope,
    rope_into_cache,
    scale_sums,
)
from qcompile.kernels._weight import Layout

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

# Compute capability → shared memory of a program, in KiB.
GPUS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

WIDELY = (80, 90)  # where every variant is tried; elsewhere one a kernel, to save time

# Kernels that read several elements of x at once.
PACKED = {linear_gemv._gemv: "*i64", linear_dot._dot: "*i64"}

# Sizes that are multiples of 16.
ALIGNED = ("N", "K", "columns", "keys", "capacity")

# What a cache is called that may hold codes.
CACHES = {
    attention_codes._split_codes: ("k_ptr", "v_ptr"),
    rope_into_cache._rope_into_cache: ("keys_ptr", "values_ptr"),
}

FOUR_BITS = Layout.of("u4/g64/asym")
EIGHT_BITS = Layout.of("i8/row/sym")
TWO_BITS = Layout.of("i2/g64/sym")
THREE_BITS = Layout.of("i3/g64/sym")
FP8_TILES = Layout.of("fp8_e4m3/b128x128/sym")
NF4 = Layout.of("nf4/g64/sym")


def compiled(
    kernel: Any,
    gpu: int,
    absent: tuple[str, ...],
    warps: int,
    stages: int = 3,
    registers: int | None = None,
    codes: str = "",
    types: Mapping[str, str] = MappingProxyType({}),
    **constants: Any,
) -> Any:
    """`kernel` for this GPU. Arguments named …_ptr point to 16-bit floats, but for data and packed x, and `codes` of a
    cache. `types` has those of other arguments."""
    if "PDL" in kernel.arg_names:
        constants["PDL"] = gpu >= 90
    short = "fp16" if gpu < 80 else "bf16"
    constants.update(dict.fromkeys(absent))
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name == "data_ptr":
            signature[name] = "*i32"
        elif name in ("x_ptr", "norm_ptr") and kernel in PACKED:
            signature[name] = PACKED[kernel]
        elif codes and name in CACHES.get(kernel, ()):
            signature[name] = "*i32" if kernel is attention_codes._split_codes else codes
        elif name.endswith(("scales_ptr", "k_scale_ptr", "v_scale_ptr")) or name in (
            "parts_ptr",
            "sums_ptr",
            "table_ptr",
            "scores_ptr",
            "found_ptr",
            "noise_ptr",
            "best_ptr",
        ):
            signature[name] = "*fp32"
        elif name == "mask_ptr":
            signature[name] = "*i1"
        elif name in ("positions_ptr", "tokens_ptr"):
            signature[name] = "*i64"
        elif name == "places_ptr":
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{short}"
        else:
            signature[name] = "fp32" if name in ("eps", "scale", "softcap", "tail", "min_p") else "i32"
        aligned = name.endswith(("_ptr", "_batch", "_head", "_row", "_stride")) or name in ALIGNED
        if aligned and name not in constants:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constants, attributes)
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)


def absent_of(layout: Layout) -> tuple[str, ...]:
    return ("table_ptr",) * (not layout.table) + ("zero_ptr",) * (layout is not FOUR_BITS)


def stack_bytes(cubin: bytes) -> int:
    """Local memory of a thread: what did not fit into registers."""
    return max(map(int, re.findall(r"STACK:(\d+)", told(cubin, "-res-usage"))), default=0)


def told(cubin: bytes, option: str) -> str:
    """What cuobjdump says, or nothing where there is none."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout


def variants(gpu: int) -> dict[str, Any]:
    """Name → compiled kernel."""
    device = _tuning.Device(gpu // 10, GPUS[gpu] << 10)
    dtype = torch.bfloat16
    found = {}
    few = (("one row", FOUR_BITS, 1), ("eight rows", FOUR_BITS, 8), ("three bits", THREE_BITS, 1))
    for name, layout, rows in (*few, ("fp8", FP8_TILES, 1), ("nf4", NF4, 4)):
        if name != "one row" and gpu not in WIDELY:
            continue
        tile = _tuning.gemv_tile(rows, 4096, 4096, 16 * layout.fields)
        sizes = {"EVEN": layout is not THREE_BITS, "ROWS": rows, "OUTPUTS": tile.outputs, "CHUNKS": tile.chunks}
        absent = ("bias_ptr", *absent_of(layout))
        kernel = linear_gemv._gemv
        found[f"gemv, {name}"] = compiled(kernel, gpu, absent, tile.warps, ACTIVATION="silu", W=layout, **sizes)
    found |= dots(gpu, device)
    found |= on_tensor_cores(gpu, device)
    some = (("16 rows", FOUR_BITS, 16), ("200 rows", FOUR_BITS, 200), ("three bits", THREE_BITS, 64))
    for name, layout, rows in (*some, ("fp8", FP8_TILES, 64), ("nf4", NF4, 200)):
        if name != "200 rows" and gpu not in WIDELY:
            continue
        if not device.tensor_cores:
            continue  # Triton has no tensor cores before 8.0, and _tuning.way never chooses this kernel there
        tile = _tuning.gemm_tile(rows, 4096, 4096, 16 * layout.fields, dtype, device)
        sizes = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "CHUNKS": tile.chunks}
        absent, kernel = ("bias_ptr", *absent_of(layout)), linear_gemm._gemm
        found[f"gemm, {name}"] = compiled(
            kernel,
            gpu,
            absent,
            tile.warps,
            tile.stages,
            ACTIVATION=None,
            W=layout,
            EVEN=layout is not THREE_BITS,
            **sizes,
        )
    block = {"SPLITS": 4, "ACTIVATION": "gelu", "BLOCK": linear_gemm.FINISH_BLOCK}
    found["finish"] = compiled(linear_gemm._finish, gpu, (), 4, **block)
    tile = _tuning.dequantize_tile(4)
    for name, layout in (("", FOUR_BITS), (", fp8", FP8_TILES), (", nf4", NF4)):
        sizes = {"W": layout, "EVEN": True, "BLOCK_N": tile.outputs, "CHUNKS": tile.chunks}
        absent, kernel = absent_of(layout), dequantize_gpu._dequantize
        found[f"dequantize{name}"] = compiled(kernel, gpu, absent, tile.warps, **sizes)
    found |= products_of_codes(gpu, device)
    sizes = {"PARTS": 2, "ACTIVATION": "silu", "BLOCK": scale_sums.BLOCK}
    for sums in ("*i32", "*fp32"):
        types = {"parts_ptr": sums, "step_ptr": "*fp32", "scale_ptr": "*fp32"}
        found[f"scale_sums, {sums}"] = compiled(scale_sums._scale_sums, gpu, (), 4, types=types, **sizes)
    sizes |= {"PARTS": 1, "ACTIVATION": None}
    for codes in ("*i8", "*fp8e4nv") if gpu >= 89 else ("*i8",):
        types = {"parts_ptr": codes, "step_ptr": "*fp32"}
        absent, kernel = ("scale_ptr", "bias_ptr"), scale_sums._scale_sums
        found[f"scale_sums, {codes}"] = compiled(kernel, gpu, absent, 4, types=types, **sizes)
    found["rms_norm"] = compiled(norm._rms_norm, gpu, (), 8, OFFSET=0.0, BLOCK_M=1, BLOCK_N=4096)
    found["layer_norm"] = compiled(norm._layer_norm, gpu, (), 8, BLOCK_M=1, BLOCK_N=4096)
    found["gated_act"] = compiled(gated_act._gated_act, gpu, (), 4, ACTIVATION="silu", BLOCK_M=1, BLOCK_N=1024)
    for element in ("*i8", "*u8") if gpu >= 89 else ("*i8",):
        types, sizes = {"codes_ptr": element, "step_ptr": "*fp32"}, {"ACTIVATION": "silu", "BLOCK": 16384}
        found[f"gated_codes, {element}"] = compiled(gated_codes._gated_codes, gpu, (), 16, types=types, **sizes)
    found["rope"] = compiled(rope._rope, gpu, (), 4, HALF=64, BLOCK_M=8, BLOCK_N=64)
    sizes = {"HALF": 64, "WIDTH": 128, "BLOCK_M": 4, "BLOCK_N": 64, "BLOCK_V": 128}
    kernel, scales = rope_into_cache._rope_into_cache, ("key_scales_ptr", "value_scales_ptr")
    found["rope_into_cache"] = compiled(kernel, gpu, scales, 4, **sizes)
    for codes in codes_of(gpu):
        found[f"rope_into_cache, {codes}"] = compiled(kernel, gpu, (), 4, codes=codes, **sizes)
    found["candidates"] = compiled(draw._candidates, gpu, (), 4, PART=draw.PART, ROOM=64)
    found["draw"] = compiled(draw._draw, gpu, (), 8, BLOCK=4096)
    found["draw of many"] = compiled(draw._draw, gpu, (), 16, BLOCK=draw.MOST)
    return found | attentions(gpu, device)


def codes_of(gpu: int) -> tuple[str, ...]:
    return ("*i8", "*u8") if gpu >= 89 else ("*i8",)


def dots(gpu: int, device: _tuning.Device) -> dict[str, Any]:
    """linear_dot alone, and with all that may stand around it."""
    if not device.tensor_cores:
        return {}  # no asynchronous copies before 8.0
    found = {}
    alone: dict[str, Any] = {"ACTIVATION": "silu", "GATED": False, "NORM": False, "OFFSET": 0.0}
    some = (
        ("one row", FOUR_BITS, 1, 4096, alone),
        ("two rows", TWO_BITS, 2, 4096, alone),
        ("three bits", THREE_BITS, 1, 14336, alone),
        ("eight bits", EIGHT_BITS, 1, 14336, alone),
        ("normed and gated", FOUR_BITS, 2, 4096, alone | {"GATED": True, "NORM": True}),
        ("long", FOUR_BITS, 1, 14336, alone),
        ("wide", FOUR_BITS, 2, 4096, alone | {"GATED": True, "NORM": True}),
    )
    for name, layout, rows, columns, around in some:
        if name != "one row" and gpu not in WIDELY:
            continue
        outputs = 28672 if name == "wide" else 4096
        tile = _tuning.dot_tile(rows, outputs, columns, 16 * layout.fields, layout.bits, device)
        groups = columns // layout.group if layout.group else 1
        sizes = {"ROWS": rows, "OUTPUTS": tile.outputs, "SPLIT": tile.split, "STEPS": tile.steps, "AHEAD": tile.ahead}
        sizes |= {"WORDS": tile.words, "LATE": tile.late}
        lengths = {
            "K": columns,
            "DATA_STRIDE": columns * layout.bits // 128,
            "SCALE_STRIDE": groups,
            "ZERO_STRIDE": groups,
        }
        absent = ("bias_ptr", *absent_of(layout)[1:], *(("norm_ptr", "residual_ptr") if around is alone else ()))
        found[f"dot, {name}"] = compiled(
            linear_dot._dot, gpu, absent, tile.warps, W=layout, EVEN=True, **around, **sizes, **lengths
        )
    return found


def on_tensor_cores(gpu: int, device: _tuning.Device) -> dict[str, Any]:
    """linear_few and linear_mma."""
    if not device.tensor_cores:
        return {}
    found = {}
    for layout, rows in ((FOUR_BITS, 4), (FOUR_BITS, 16), (TWO_BITS, 8), (THREE_BITS, 8), (EIGHT_BITS, 8)):
        if (layout, rows) != (FOUR_BITS, 4) and gpu not in WIDELY:
            continue
        few = _tuning.few_tile(rows, 16384, 4096, layout.bits, device)
        sizes = {"TOKENS": few.tokens, "CODES": few.codes, "STAGES": few.stages, "SPLIT": few.split}
        absent, registers = ("bias_ptr", *absent_of(layout)[1:]), min(255, 2048 // (few.warps * few.together))
        sizes |= {"ACTIVATION": "silu", "W": layout, "EVEN": layout is not THREE_BITS}
        for gated in (False, True) if rows == 4 else (False,):
            name = f"few, {layout.bits} bits, {rows} rows" + ", gated" * gated
            found[name] = compiled(linear_few._few, gpu, absent, few.warps, registers=registers, GATED=gated, **sizes)
    some = [(FOUR_BITS, rows) for rows in (16, 30, 48, 64, 80, 112, 160, 256, 300)]
    for layout, rows in (*some, (TWO_BITS, 16), (THREE_BITS, 200), (EIGHT_BITS, 64), (EIGHT_BITS, 160)):
        if (layout, rows) != (FOUR_BITS, 16) and gpu not in WIDELY:
            continue
        tile = _tuning.mma_tile(rows, 16384, 4096, layout.bits, device)
        sizes = {"TOKENS": tile.tokens, "CODES": tile.codes, "STAGES": tile.stages, "WARP_GROUPS": tile.warp_groups}
        absent, registers = ("bias_ptr", *absent_of(layout)[1:]), min(255, 2048 // (tile.warps * tile.together))
        sizes |= {"ACTIVATION": "silu", "W": layout, "EVEN": layout is not THREE_BITS}
        for gated in (False, True) if layout is FOUR_BITS and rows in (16, 160) else (False,):
            name = f"mma, {layout.bits} bits, {rows} rows" + ", gated" * gated
            found[name] = compiled(linear_mma._mma, gpu, absent, tile.warps, registers=registers, GATED=gated, **sizes)
    return found | by_warp_groups(gpu, device)


def by_warp_groups(gpu: int, device: _tuning.Device) -> dict[str, Any]:
    """linear_wgmma."""
    if device.major != 9:
        return {}
    found = {}
    for layout, tokens in ((FOUR_BITS, 128), (FOUR_BITS, 192), (FOUR_BITS, 256), (THREE_BITS, 128)):
        stages = _tuning.wgmma_stages(tokens, layout.bits, device)
        sizes = {"TOKENS": tokens, "CODES": _tuning.WGMMA_CODES, "STAGES": stages, "ACTIVATION": "silu", "W": layout}
        sizes |= {"PIECE": max(linear_wgmma.PIECE, 16 * layout.fields), "EVEN": layout is not THREE_BITS}
        sizes |= {"MULTIPLYING": linear_wgmma.MULTIPLYING, "FETCHING": linear_wgmma.FETCHING}
        absent, kernel = ("bias_ptr", *absent_of(layout)[1:]), linear_wgmma._wgmma
        name = f"wgmma, {layout.bits} bits, {tokens} rows"
        found[name] = compiled(kernel, gpu, absent, 4, registers=linear_wgmma.LAUNCHED, **sizes)
    return found


def products_of_codes(gpu: int, device: _tuning.Device) -> dict[str, Any]:
    """linear_codes."""
    if device.major != 9:
        return {}
    found = {}
    for element, sums in (("i8", "*i32"), ("fp8e4nv", "*fp32")):
        for rows, inputs in ((32, 4096), (32, 14336), (512, 4096), (2048, 4096)):
            tile = _tuning.product_tile(rows, 4096, inputs, element == "i8", device)
            types = {"step_ptr": "*fp32", "scale_ptr": "*fp32"}
            types |= {"x": described(element, tile.at_once, 128), "w": described(element, 64, 128)}
            types["out"] = sums if tile.splits > 1 else described("bf16", tile.at_once, 64)
            sizes = {"BLOCKS": tile.tokens // tile.at_once, "STAGES": tile.stages, "SPLIT": tile.splits > 1}
            sizes |= {"step_stride": 1, "scale_stride": 1}
            absent, activation = ((), "silu") if tile.splits == 1 else (("bias_ptr",), None)
            found[f"codes, {element}, {rows} rows of {inputs}"] = compiled(
                linear_codes._products,
                gpu,
                absent,
                4,
                registers=linear_codes.REGISTERS,
                types=types,
                ACTIVATION=activation,
                **sizes,
            )
    return found


def described(element: str, rows: int, columns: int) -> str:
    """The type of what the copy engine takes (rows, columns) of at a time."""
    return f"tensordesc<{element}[{rows},{columns}],{linear_codes._layout(16 if element == 'bf16' else 8)!r}>"


def attentions(gpu: int, device: _tuning.Device) -> dict[str, Any]:
    """attention_decode for 32 query heads over 8 of 128 columns, 71 over one of 64, and 16 over 16 of 256."""
    found = {}
    for pairs, rows, width in ((8, 4, 128), (1, 71, 64), (512, 1, 256)):
        if gpu not in WIDELY and width != 128:
            continue
        tile = _attention_tiles.attention_tile(pairs, rows, 8192, width, 2, device)
        sizes = {"D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "BLOCK_M": tile.rows}
        steps = {"BLOCK_N": tile.keys, "MASK_ROWS": 1, "SCAN": _attention.SCAN_ELEMENTS, "EARLY": True}
        beside = {"BESIDE": tile.beside}
        # The widest with a soft-cap.
        absent = ("softcap",) * (width < 256) + ("sums_ptr", "parts_ptr") * (tile.splits == 1)
        plain = {"k_column": 1, "v_column": 1, "mask_column": 1}
        name = f"attention, {rows} rows of {width}"
        found[name] = compiled(
            attention_decode._split, gpu, absent, tile.warps, tile.stages, **sizes, **steps, **beside, **plain
        )
        tile = _attention_tiles.codes_tile(pairs, rows, 8192, width, 2, device)
        sizes["BLOCK_M"], steps["BLOCK_N"] = tile.rows, tile.keys
        for codes in codes_of(gpu):
            found[f"{name}, {codes}"] = compiled(
                attention_codes._split_codes, gpu, absent, tile.warps, 1, codes=codes,
                IS_INTEGER=codes == "*i8", **sizes, **steps, mask_column=1,
            )  # fmt: skip
    found |= prompts(gpu, device)
    tile = _attention_tiles.attention_tile(8, 4, 1024, 128, 2, device)
    sizes = {"D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK_DV": 128, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys}
    found["attention_into_cache"] = compiled(
        attention_into_cache._step,
        gpu,
        ("softcap",),
        tile.warps,
        tile.stages,
        **sizes,
        BESIDE=tile.beside,
        SCAN=1024,
        FETCHED=attention_into_cache.FETCHED,
        EARLY=True,
        mask_column=1,
    )
    sizes = {"DV": 128, "BLOCK_DV": 128, "SPLITS": 32}
    found["attention, combine"] = compiled(_attention._combine, gpu, (), 8, **sizes)
    return found


def prompts(gpu: int, device: _tuning.Device) -> dict[str, Any]:
    """attention_prompt, the widest with a soft-cap."""
    found = {}
    for width in (64, 128, 256) if gpu in WIDELY else (128,):
        if (tile := _attention_tiles.prompt_tile(width, 2, device)) is None:
            continue
        blocks, constants = {"BLOCK_M": tile.rows, "BLOCK_N": tile.keys}, {"mask_column": 1}
        sizes = {"D": width, "DV": width, "BLOCK_D": width, "BLOCK_DV": width, "BLOCKS": 64}
        absent = ("softcap",) * (width < 256) + ("sums_ptr", "parts_ptr")
        found[f"prompts of {width}"] = compiled(
            attention_prompt._prompt, gpu, absent, tile.warps, tile.stages, **blocks, **sizes, **constants
        )
        found[f"survey of {width}"] = compiled(attention_prompt._survey, gpu, (), 4, **blocks, **constants)
    return found


@pytest.mark.parametrize("gpu", GPUS)
def test_compiles_and_fits(gpu: int) -> None:
    kernels = variants(gpu)
    assert {name: k.metadata.shared for name, k in kernels.items() if k.metadata.shared > GPUS[gpu] << 10} == {}
    stacks = {name: stack_bytes(kernel.asm["cubin"]) for name, kernel in kernels.items()}
    assert {name: n for name, n in stacks.items() if n > most_stack_bytes(name)} == {}


def most_stack_bytes(name: str) -> int:
    """Some keep there what they need once a tile: products of floats where Triton 3.9 compiles them, and the widest
    tiles of linear_wgmma, which have most of their registers for sums."""
    if name == "wgmma, 4 bits, 256 rows":
        return 256
    return 96 if name.startswith("codes, fp8") else 32


def test_products_of_warp_groups_overlap() -> None:
    """ptxas makes each product wait for the one before it where it cannot tell who writes the sums (C7515)."""
    device = _tuning.Device(9, GPUS[90] << 10)
    kernels = on_tensor_cores(90, device) | products_of_codes(90, device)
    serial = {}
    for name, kernel in kernels.items():
        code = told(kernel.asm["cubin"], "-sass")
        products = code.count("GMMA.64x")
        if products and code.count("WARPGROUP.DEPBAR") >= products:
            serial[name] = products
    assert serial == {}


def test_keys_and_values_are_fetched_ahead() -> None:
    """Shared memory holds those of several steps."""
    device = _tuning.Device(9, GPUS[90] << 10)
    tile = _attention_tiles.attention_tile(8, 4, 8192, 128, 2, device)
    assert attentions(90, device)["attention, 4 rows of 128"].metadata.shared > 2 * tile.keys * 2 * 128 * 2
