"""Sums of products of codes, in one or several parts, become outputs, or codes what they stand for: a program makes
some of a row."""

from __future__ import annotations

from torch import Tensor

from qcompile.kernels._tiles import (
    activate,
    cdiv,
    dependent_launch,
    gdc_launch_dependents,
    gdc_wait,
    launch,
    tl,
    triton,
)

BLOCK = 1024


def scale_sums(
    parts: Tensor, step: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor, activation: str | None
) -> None:
    """out = act(sum of parts (P, M, N) * step by row * scale by column + bias); steps and scales may be one for all.

    Parts are int32 or float32, one may be codes, and contiguous; `out` may have other columns beside its own.
    """
    count, m, n = parts.shape
    launch(
        _scale_sums,
        (m, cdiv(n, BLOCK)),
        parts,
        step,
        scale,
        bias,
        out,
        n,
        m * n,
        out.stride(0),
        int(step.shape[0] > 1),
        int(scale is not None and scale.shape[0] > 1),
        PARTS=count,
        ACTIVATION=activation,
        BLOCK=BLOCK,
        PDL=dependent_launch(out),
    )


@triton.jit
def _scale_sums(
    parts_ptr, step_ptr, scale_ptr, bias_ptr, out_ptr, N, part_stride, out_stride, step_stride, scale_stride,
    PARTS: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    at = parts_ptr + m * N + n
    sums = tl.load(at, mask=inside)
    for _ in tl.static_range(1, PARTS):
        at += part_stride
        sums += tl.load(at, mask=inside)
    y = sums.to(tl.float32) * tl.load(step_ptr + m * step_stride)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n * scale_stride, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + m * out_stride + n, activate(y, ACTIVATION).to(out_ptr.dtype.element_ty), mask=inside)
