"""Codes of x times codes of a weight on a Hopper GPU, both of 8 bits: i8 by i8, or fp8_e4m3 by fp8_e4m3.

A program makes tiles of 128 outputs of some rows of x, one after another. One warp has the copy engine bring codes of
both a few steps ahead; two groups of four warps multiply 64 outputs each. Their weights pass through registers, where
codes of i8 lose their offset with one operation on four of them. With splits > 1 a tile has its share of the inputs
alone, and scale_sums adds the parts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels import _turns
from qcompile.kernels._gluon import (
    TensorDescriptor,
    begin_load,
    begin_store,
    gl,
    gluon,
    hopper,
    launch_dependents,
    mbarrier,
    store_wait,
    wait,
)
from qcompile.kernels._tiles import INTERPRET, activate, cdiv, constexpr, dependent_launch, launch
from qcompile.kernels.scale_sums import scale_sums

OUTPUTS = _turns.PRODUCT_OUTPUTS
CODES = _turns.PRODUCT_CODES
# Registers of a thread: when the kernel starts, and later those of a group that multiplies and of the warp that copies.
REGISTERS, MULTIPLYING, COPYING = 168, constexpr(240), constexpr(24)


def refuses(codes: Tensor, data: Tensor, out: torch.dtype) -> str | None:
    """Why this kernel does not take codes (M, K) and data (N, K), or None."""
    if gl is None or INTERPRET:
        return "needs Gluon, which came with Triton 3.5 and has no interpreter"
    if torch.cuda.get_device_capability(codes.device)[0] != 9:
        return "needs a GPU of compute capability 9.0"
    if out.itemsize != 2:
        return "makes outputs of 16 bits"
    if codes.shape[1] % 16 or data.shape[0] % 8:
        return f"needs multiples of 16 inputs and of 8 outputs, not {codes.shape[1]} and {data.shape[0]}"
    if codes.data_ptr() % 16 or data.data_ptr() % 16:
        return "needs codes that begin at multiples of 16 bytes"
    return None


def multiply_codes(
    codes: Tensor,
    step: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
    tile: _turns.ProductTile,
) -> Tensor:
    """act(codes @ W.T * step by row * scale by output + bias), for contiguous codes (M, K) and data (N, K).

    int8 codes go with data of uint8 that starts at 0. Steps, in float32, and scales, of any floats, may be one for all.
    """
    (m, k), n = codes.shape, data.shape[0]
    out = codes.new_empty(m, n, dtype=dtype)
    parts = None
    if tile.splits > 1:
        parts = codes.new_empty(tile.splits, m, n, dtype=torch.int32 if codes.dtype == torch.int8 else torch.float32)
    launch(
        _products,
        (min(cdiv(m, tile.tokens) * cdiv(n, OUTPUTS) * tile.splits, tile.programs),),
        step,
        _described(codes, tile.at_once, CODES),
        _described(data.view(codes.dtype), OUTPUTS // 2, CODES),
        _described(out, tile.at_once, OUTPUTS // 2) if parts is None else parts,
        scale,
        bias if parts is None else None,
        m,
        n,
        k,
        tile.splits,
        int(step.shape[0] > 1),
        int(scale.shape[0] > 1),
        ACTIVATION=activation if parts is None else None,
        BLOCKS=tile.tokens // tile.at_once,
        STAGES=tile.stages,
        SPLIT=parts is not None,
        PDL=dependent_launch(out),
        num_warps=4,
        maxnreg=REGISTERS,
    )
    if parts is not None:
        scale_sums(parts, step, scale, bias, out, activation)
    return out


def _described(x: Tensor, rows: int, columns: int) -> Any:
    """x, of which the copy engine takes (rows, columns) at a time."""
    return TensorDescriptor(x, x.shape, x.stride(), [rows, columns], _layout(8 * x.element_size()))


@functools.cache
def _layout(bits: int) -> Any:
    return gl.NVMMASharedLayout(128, bits, 2)


@gluon.jit(do_not_specialize=["M", "N", "K", "splits"])
def _products(
    step_ptr, x, w, out, scale_ptr, bias_ptr, M, N, K, splits, step_stride, scale_stride,
    ACTIVATION: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    HALF: gl.constexpr = w.block_type.shape[0]
    AT_ONCE: gl.constexpr = x.block_type.shape[0]
    CODES: gl.constexpr = x.block_type.shape[1]
    if PDL:
        launch_dependents()
    xs = gl.allocate_shared_memory(x.dtype, [STAGES * BLOCKS, AT_ONCE, CODES], x.layout)
    ws = gl.allocate_shared_memory(w.dtype, [STAGES * 2, HALF, CODES], w.layout)
    outs = xs if SPLIT else gl.allocate_shared_memory(out.dtype, [2 * BLOCKS, AT_ONCE, HALF], out.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    hopper.fence_async_shared()
    if PDL:
        wait()
    shared = xs, ws, outs, ready, free
    sides = step_ptr, scale_ptr, bias_ptr, step_stride, scale_stride
    size = M, N, K, splits
    gl.warp_specialize(
        [
            (_multiply, (shared, out, sides, size, 0, ACTIVATION, BLOCKS, STAGES, SPLIT)),
            (_multiply, (shared, out, sides, size, 1, ACTIVATION, BLOCKS, STAGES, SPLIT)),
            (_copy, (shared, x, w, size, BLOCKS, STAGES)),
        ],
        [4, 1],
        [MULTIPLYING, COPYING],
    )


@gluon.jit
def _items(size, TOKENS: gl.constexpr, OUTPUTS: gl.constexpr):
    """How many tiles, or parts of them, there are to make."""
    M, N, _K, splits = size
    return gl.cdiv(M, TOKENS) * gl.cdiv(N, OUTPUTS) * splits


@gluon.jit
def _place(item, size, TOKENS: gl.constexpr, OUTPUTS: gl.constexpr, CODES: gl.constexpr):
    """The first row and output of a tile, and the first step and the one behind the last. Tiles that are made at the
    same time share rows and outputs: they read them from the L2 cache."""
    M, N, K, splits = size
    TOGETHER: gl.constexpr = 2048 // TOKENS
    tile, split = item // splits, item % splits
    wide = gl.cdiv(N, OUTPUTS)
    first = tile // (TOGETHER * wide) * TOGETHER
    count = gl.minimum(gl.cdiv(M, TOKENS) - first, TOGETHER)
    rest = tile - first * wide
    steps = gl.cdiv(K, CODES)
    m, n = (first + rest % count) * TOKENS, rest // count * OUTPUTS
    return m, n, split, split * steps // splits, (split + 1) * steps // splits


@gluon.jit
def _copy(shared, x, w, size, BLOCKS: gl.constexpr, STAGES: gl.constexpr):
    xs, ws, _outs, ready, free = shared
    AT_ONCE: gl.constexpr = x.block_type.shape[0]
    HALF: gl.constexpr = w.block_type.shape[0]
    CODES: gl.constexpr = x.block_type.shape[1]
    TOKENS: gl.constexpr = BLOCKS * AT_ONCE
    i = 0
    for item in range(gl.program_id(0), _items(size, TOKENS, 2 * HALF), gl.num_programs(0)):
        m, n, _split, first, last = _place(item, size, TOKENS, 2 * HALF, CODES)
        for step in range(first, last):
            slot = i % STAGES
            mbarrier.wait(free.index(slot), i // STAGES % 2 ^ 1)
            bar, k = ready.index(slot), step * CODES
            mbarrier.expect(bar, (TOKENS + 2 * HALF) * CODES)
            for half in gl.static_range(2):
                begin_load(w, [n + half * HALF, k], bar, ws.index(2 * slot + half))
            for block in gl.static_range(BLOCKS):
                begin_load(x, [m + block * AT_ONCE, k], bar, xs.index(slot * BLOCKS + block))
            i += 1


@gluon.jit
def _multiply(
    shared, out, sides, size, PART: gl.constexpr,
    ACTIVATION: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Half of the outputs of each tile."""
    xs, ws, outs, ready, free = shared
    AT_ONCE: gl.constexpr = xs.type.shape[1]
    CODES: gl.constexpr = xs.type.shape[2]
    HALF: gl.constexpr = ws.type.shape[1]
    TOKENS: gl.constexpr = BLOCKS * AT_ONCE
    SUM: gl.constexpr = gl.int32 if xs.dtype == gl.int8 else gl.float32
    L: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, AT_ONCE, 32])
    i = 0
    for item in range(gl.program_id(0), _items(size, TOKENS, 2 * HALF), gl.num_programs(0)):
        m, n, split, first, last = _place(item, size, TOKENS, 2 * HALF, CODES)
        n += PART * HALF
        sums = ()
        for _ in gl.static_range(BLOCKS):
            sums += (gl.zeros([HALF, AT_ONCE], SUM, L),)
        for _ in range(first, last):
            slot = i % STAGES
            mbarrier.wait(ready.index(slot), i // STAGES % 2)
            sums = _add_step(_weights(ws.index(2 * slot + PART), L), xs, slot * BLOCKS, sums)
            mbarrier.arrive(free.index(slot), count=1)
            i += 1
        if SPLIT:
            _store_part(sums, out, split, m, n, size)
        else:
            _store(sums, outs, out, PART * BLOCKS, sides, m, n, size, ACTIVATION)
    if not SPLIT:
        store_wait(0)


@gluon.jit
def _weights(part, L: gl.constexpr):
    a = part.load(gl.DotOperandLayout(0, L, 4))
    if part.dtype == gl.int8:
        a = gl.inline_asm_elementwise("xor.b32 $0, $1, 0x80808080;", "=r,r", [a], gl.int8, is_pure=True, pack=4)
    return a


@gluon.jit
def _add_step(a, xs, first, sums):
    """The sums with a step's products.

    Tensor cores of Hopper keep 14 bits of what they add products of floats to: those of a step are added up apart.
    NOTE: 14336 inputs, H100: an error of 3.3e-3 without it, with it 1.7e-3, which is the rounding to bfloat16.
    """
    done = ()
    for block in gl.static_range(len(sums)):
        b = xs.index(first + block).permute((1, 0))
        if a.dtype == gl.int8:
            done += (hopper.warpgroup_mma(a, b, sums[block], is_async=True),)
        else:
            part = hopper.warpgroup_mma(a, b, gl.zeros_like(sums[block]), use_acc=False, is_async=True)
            done += (sums[block] + hopper.warpgroup_mma_wait(0, deps=(part,)),)
    if a.dtype == gl.int8:
        waited = hopper.warpgroup_mma_wait(0, deps=done)
        done = waited if len(sums) > 1 else (waited,)
    return done


@gluon.jit
def _store(sums, outs, out, first, sides, first_m, first_n, size, ACTIVATION: gl.constexpr):
    step_ptr, scale_ptr, bias_ptr, step_stride, scale_stride = sides
    M, N, _K, _splits = size
    AT_ONCE: gl.constexpr = sums[0].shape[1]
    L: gl.constexpr = sums[0].type.layout
    n = first_n + gl.arange(0, sums[0].shape[0], layout=gl.SliceLayout(1, L))
    n = gl.minimum(n, N - 1)
    scale = gl.load(scale_ptr + n * scale_stride).to(gl.float32)[:, None]
    store_wait(0)  # the last tile has left shared memory
    for block in gl.static_range(len(sums)):
        m = first_m + block * AT_ONCE + gl.arange(0, AT_ONCE, layout=gl.SliceLayout(0, L))
        step = gl.load(step_ptr + gl.minimum(m, M - 1) * step_stride)[None, :]
        y = sums[block].to(gl.float32) * step * scale
        if bias_ptr is not None:
            y += gl.load(bias_ptr + n).to(gl.float32)[:, None]
        outs.index(first + block).permute((1, 0)).store(activate(y, ACTIVATION).to(out.dtype))
    hopper.fence_async_shared()
    for block in gl.static_range(len(sums)):
        begin_store(out, [first_m + block * AT_ONCE, first_n], outs.index(first + block))


@gluon.jit
def _store_part(sums, parts_ptr, part, first_m, first_n, size):
    """Eight threads write neighbouring outputs."""
    M, N, _K, _splits = size
    AT_ONCE: gl.constexpr = sums[0].shape[1]
    L: gl.constexpr = sums[0].type.layout
    n = gl.arange(0, sums[0].shape[0], layout=gl.SliceLayout(1, L))
    for block in gl.static_range(len(sums)):
        m = gl.arange(0, AT_ONCE, layout=gl.SliceLayout(0, L))
        block_m = first_m + block * AT_ONCE
        start = parts_ptr + (part.to(gl.int64) * M + block_m) * N + first_n
        inside = (m < M - block_m)[None, :] & (n < N - first_n)[:, None]
        gl.store(start + (m * N)[None, :] + n[:, None], sums[block], mask=inside)
