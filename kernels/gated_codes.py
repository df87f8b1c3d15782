"""act(gate) * up as 8-bit codes by token, for a linear that multiplies codes. One program makes a row, read once."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.kernels import gated_act, linear_w8a8_cuda
from qcompile.kernels._tiles import (
    activate,
    as_rows,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    launched,
    power_of_two,
    row_offset,
    tl,
)
from qcompile.kernels.linear_w8a8_cuda import linear_codes_cuda
from qcompile.ops.gated_linear_w8a8 import gated_linear_w8a8
from qcompile.ops.registry import opaque
from qcompile.quant.activation import CODES

ROUNDINGS = tuple(f"{element}/token/dynamic" for element in CODES)
MAX_COLUMNS = 32768  # what the registers of a program hold


def refuses(
    gate: Tensor,
    up: Tensor,
    gate_activation: str,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> str | None:
    if rounding not in ROUNDINGS:
        return f"makes codes as {' or '.join(ROUNDINGS)} has them, not {rounding}"
    if gate.dtype != up.dtype:
        return f"gate and up differ in dtype: {gate.dtype} and {up.dtype}"
    if gate.shape[-1] > MAX_COLUMNS:
        return f"handles rows of up to {MAX_COLUMNS} elements, not {gate.shape[-1]}"
    if reason := gated_act.refuses(gate, up, gate_activation):
        return reason
    return linear_w8a8_cuda.refuses(gate, None, rounding, data, scale, zero, bias, spec, activation)


def _fake(gate: Tensor, up: Tensor, activation: str, element: str) -> tuple[Tensor, Tensor]:
    step = gate.new_empty((*gate.shape[:-1], 1), dtype=torch.float32)
    return gate.new_empty(gate.shape, dtype=CODES[element]), step


@opaque(_fake)
def gated_codes(gate: Tensor, up: Tensor, activation: str, element: str) -> tuple[Tensor, Tensor]:
    """The codes of gated_act(gate, up, activation), (…, n), and the scale of each token (…, 1)."""
    codes, step = _fake(gate, up, activation, element)
    if gate.numel() == 0:
        return codes, step
    columns = gate.shape[-1]
    gate, rows, *gate_strides = as_rows(gate)
    up, _, *up_strides = as_rows(up)
    block = power_of_two(columns)
    launch(
        _gated_codes,
        (rows,),
        gate,
        up,
        codes if element == "i8" else codes.view(torch.uint8),
        step,
        columns,
        *gate_strides,
        *up_strides,
        ACTIVATION=activation,
        BLOCK=block,
        PDL=dependent_launch(gate),
        num_warps=max(1, min(16, block // 1024)),
    )
    return codes, step


@gated_linear_w8a8.implementation("codes", refuses, device="cuda")
def gated_linear_w8a8_cuda(
    gate: Tensor,
    up: Tensor,
    gate_activation: str,
    rounding: str,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    spec: str,
    activation: str | None,
) -> Tensor:
    codes, step = gated_codes(gate, up, gate_activation, rounding.partition("/")[0])
    return linear_codes_cuda(codes, step, data, scale, bias, spec, activation, gate.dtype)


@launched
def _gated_codes(
    gate_ptr, up_ptr, codes_ptr, step_ptr, columns, g_inner, g_outer_stride, g_inner_stride,
    u_inner, u_outer_stride, u_inner_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(gate_ptr + row_offset(row, g_inner, g_outer_stride, g_inner_stride) + column, inside, 0.0)
    up = tl.load(up_ptr + row_offset(row, u_inner, u_outer_stride, u_inner_stride) + column, inside, 0.0)
    y = activate(gate.to(tl.float32), ACTIVATION) * up.to(tl.float32)
    y = y.to(gate.dtype).to(tl.float32)
    # No number where there is one in the row, which a maximum does not show.
    largest = tl.max(tl.abs(y), 0) + tl.sum(y * 0.0, 0)
    step = tl.div_rn(largest, 127.0 if codes_ptr.dtype.element_ty == tl.int8 else 448.0)
    step = tl.where(step == 0, 1.0, step)
    tl.store(step_ptr + row, step)
    code = tl.div_rn(y, step + tl.zeros_like(y))
    if codes_ptr.dtype.element_ty == tl.int8:
        code = (code + 12582912.0) - 12582912.0  # what is added to 1.5 * 2^23 is rounded to an integer
        tl.store(codes_ptr + row * columns + column, code.to(tl.int8), mask=inside)
    else:
        code = tl.clamp(code, -448.0, 448.0).to(tl.float8e4nv)
        tl.store(codes_ptr + row * columns + column, code.to(tl.uint8, bitcast=True), mask=inside)
