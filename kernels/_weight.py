"""A packed weight as the arguments that Triton kernels take, and the specs that they do not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompile.kernels._tiles import FLOATS
from qcompile.quant.granularity import PerBlock, PerGroup, PerOutputGroup, PerTensor
from qcompile.quant.packing import PLANES
from qcompile.quant.spec import QSpec, Zero


def refuses_weight(scale: Tensor, zero: Tensor | None, spec: str, columns: int) -> str | None:
    """Why the Triton kernels cannot read this weight of `columns` inputs, or None."""
    parsed = QSpec.parse(spec)
    if parsed.element.is_float:
        return f"{spec}: codes of {parsed.element} are not handled, integers are"
    if parsed.zero is Zero.SHIFT:
        return f"{spec}: zero points that are added after scaling are not handled"
    if isinstance(parsed.granularity, PerBlock):
        return f"{spec}: tiles that share a scale are not handled"
    return refuses_layout(scale, zero, spec, columns)


def refuses_layout(scale: Tensor, zero: Tensor | None, spec: str, columns: int) -> str | None:
    """Why no kernel of ours can read this weight of `columns` inputs, or None."""
    parsed = QSpec.parse(spec)
    granularity = parsed.granularity
    if parsed.element.tag == "e8m0":
        return f"{spec}: codes of e8m0 are scales"
    if isinstance(granularity, PerOutputGroup):
        return f"{spec}: groups along the output are not handled"
    if isinstance(granularity, PerBlock):
        if granularity.width % 16:
            return f"{spec}: the width of a tile must be a multiple of 16"
        if columns % granularity.width and granularity.width < columns:
            return f"{spec}: the last tiles are cut off, {granularity.width} does not divide {columns}"
    if isinstance(granularity, PerGroup):
        if granularity.size % 16:
            return f"{spec}: the group size must be a multiple of 16"
        if columns % granularity.size:
            return f"{spec}: groups run on over the row ends, {granularity.size} does not divide {columns}"
    if scale.dtype not in FLOATS:
        return f"{spec}: scale is {scale.dtype}; float32, float16 and bfloat16 are handled"
    if zero is not None and zero.dtype not in (*FLOATS, torch.uint8):
        return f"{spec}: zero is {zero.dtype}; float32, float16, bfloat16 and uint8 are handled"
    return None


@dataclass(frozen=True)
class Weight:
    """What a kernel is told about a packed weight.

    rows, columns   (out_features, in_features)
    pointers        data as int32 words, scale, zero
    strides         from row to row: data in chunks of 16 bytes, scale and zero in elements
    constants       OFFSET, the constant zero point; GROUP, codes a scale, 0 for the whole row; P0, P1, P2, plane widths
                    with the low bits first; FIELDS, units of sixteen codes in a chunk of the smallest plane
    """

    rows: int
    columns: int
    bits: int
    pointers: tuple[Tensor | None, ...]
    strides: tuple[int, int, int]
    constants: dict[str, Any]

    @property
    def step(self) -> int:
        """Codes that one chunk of the smallest plane covers."""
        return 16 * self.constants["FIELDS"]

    @staticmethod
    def of(data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, columns: int) -> Weight:
        """The weight behind an op's arguments, which `refuses_weight` has passed. Copies only what is misaligned."""
        parsed = QSpec.parse(spec)
        planes = PLANES[parsed.element.bits]
        if data.data_ptr() % 16 or data.stride(0) % 16 or data.stride(1) != 1:
            data = data.clone(memory_format=torch.contiguous_format)
        scale, scale_stride = _side(scale, parsed)
        zero, zero_stride = (None, 0) if zero is None else _side(zero, parsed)
        constants = {
            "OFFSET": parsed.offset,
            "GROUP": parsed.granularity.size if isinstance(parsed.granularity, PerGroup) else 0,
            **{f"P{i}": planes[i] if i < len(planes) else 0 for i in range(3)},
            "FIELDS": 8 // planes[-1],
        }
        pointers = (data.view(torch.int32), scale, zero)
        strides = (data.stride(0) // 16, scale_stride, zero_stride)
        return Weight(data.shape[0], columns, parsed.element.bits, pointers, strides, constants)

    def narrow(self, first: int, count: int) -> Weight:
        """The rows first … first + count - 1."""
        pointers = tuple(
            part if part is None or part.shape[0] != self.rows else part.narrow(0, first, count)
            for part in self.pointers
        )
        return replace(self, rows=count, pointers=pointers)


def _side(side: Tensor, spec: QSpec) -> tuple[Tensor, int]:
    if isinstance(spec.granularity, PerTensor):
        return side, 0
    if side.shape[1] > 1 and side.stride(1) != 1:
        side = side.contiguous()
    return side, side.stride(0)
