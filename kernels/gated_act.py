"""act(gate) * up. One program takes BLOCK_M x BLOCK_N elements; gate and up may be halves of one wide tensor."""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels._tiles import (
    activate,
    as_rows,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    power_of_two,
    refuses_device,
    row_offset,
    tl,
)
from qcompile.ops.activation import ACTIVATIONS, gated_act
from qcompile.ops.registry import opaque

BLOCK_ELEMENTS = 1024


def refuses(gate: Tensor, up: Tensor, activation: str) -> str | None:
    if activation not in ACTIVATIONS:
        return f"does not know the activation {activation}"
    if gate.shape != up.shape:
        return "gate and up differ in shape"
    return refuses_device(gate, gate.dtype) or refuses_device(up, up.dtype)


@opaque(lambda gate, up, activation: gate.new_empty(gate.shape))
def gated_act_cuda(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    columns = gate.shape[-1]
    gate, rows, *gate_strides = as_rows(gate)
    up, _, *up_strides = as_rows(up)
    block_n = min(BLOCK_ELEMENTS, power_of_two(columns))
    block_m = min(power_of_two(rows), BLOCK_ELEMENTS // block_n)
    launch(
        _gated_act,
        (cdiv(columns, block_n) * cdiv(rows, block_m),),
        gate,
        up,
        out,
        rows,
        columns,
        *gate_strides,
        *up_strides,
        ACTIVATION=activation,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PDL=dependent_launch(out),
        num_warps=4,
    )
    return out


@gated_act.implementation("triton", refuses)
def gated_act_triton(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return gated_act_cuda(gate, up, activation)


@launched
def _gated_act(
    gate_ptr, up_ptr, out_ptr, rows, columns, g_inner, g_outer_stride, g_inner_stride,
    u_inner, u_outer_stride, u_inner_stride,
    ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    blocks = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (row < rows) & (column < columns)
    gate = tl.load(gate_ptr + row_offset(row, g_inner, g_outer_stride, g_inner_stride) + column, mask=inside)
    up = tl.load(up_ptr + row_offset(row, u_inner, u_outer_stride, u_inner_stride) + column, mask=inside)
    y = activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32)
    tl.store(out_ptr + row.to(tl.int64) * columns + column, y.to(out_ptr.dtype.element_ty), mask=inside)
