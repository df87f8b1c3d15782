"""A packed weight as the arguments that Triton kernels take, and the specs that no kernel takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.kernels._tiles import FLOATS
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerBlock, PerGroup, PerOutputGroup, PerTensor
from qcompile.quant.packing import PLANES
from qcompile.quant.spec import QSpec, Zero


def refuses_weight(scale: Tensor, zero: Tensor | None, spec: str, columns: int) -> str | None:
    """Why no kernel of ours can read this weight of `columns` inputs, or None."""
    parsed = QSpec.parse(spec)
    granularity = parsed.granularity
    if parsed.element.tag == "e8m0":
        return f"{spec}: codes of e8m0 are scales"
    if isinstance(granularity, PerOutputGroup):
        return f"{spec}: groups along the output are not handled"
    if isinstance(granularity, PerBlock) and granularity.width % 16:
        return f"{spec}: the width of a tile must be a multiple of 16"
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


# A table's numbers are multiplied by this, as `byte_value` of other codes is (see _tiles.py).
TABLE_SCALE = 2.0**-74


@dataclass(frozen=True)
class Layout:
    """How a weight's codes become numbers: what a kernel is compiled for, its argument W.

    p0, p1, p2  plane widths with the low bits first, 0 for none
    offset      the constant zero point
    added       is the zero point added after scaling?
    group       inputs that share a scale; 0 where a whole row does, and it can be left to the end
    height      rows that share their scales
    exponent    of floats made of bit fields, or 0; with mantissa, bias, and special, the first of the codes without
                their sign that are inf or NaN
    table       do codes look their number up?
    """

    p0: int
    p1: int
    p2: int
    offset: int
    added: bool
    group: int
    height: int
    exponent: int
    mantissa: int
    bias: int
    special: int
    table: bool

    @property
    def bits(self) -> int:
        return self.p0 + self.p1 + self.p2

    @property
    def fields(self) -> int:
        """Units of sixteen codes in a chunk of the smallest plane."""
        return 8 // (self.p2 or self.p1 or self.p0)

    @property
    def run(self) -> int:
        """A power of two: so many codes that begin at a multiple of it share a scale."""
        return self.group & -self.group or 1 << 30

    @property
    def sharing(self) -> int:
        """Neighbouring units of a chunk that share a scale."""
        return min(self.fields, self.run // 16)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(text: str) -> Layout:
        spec = QSpec.parse(text)
        element, granularity = spec.element, spec.granularity
        planes = PLANES[element.bits]
        added = spec.zero is Zero.SHIFT
        if isinstance(granularity, PerGroup):
            group = granularity.size
        elif isinstance(granularity, PerBlock):
            group = granularity.width
        else:
            group = 1 << 30 if added else 0  # what is added cannot be left to the end
        return Layout(
            *(planes[i] if i < len(planes) else 0 for i in range(3)),
            offset=spec.offset,
            added=added,
            group=group,
            height=granularity.height if isinstance(granularity, PerBlock) else 1,
            exponent=element.exponent,
            mantissa=element.mantissa,
            bias=element.bias,
            special=element.special,
            table=element.table is not None and not element.exponent,
        )


@dataclass(frozen=True)
class Weight:
    """What a kernel is told about a packed weight.

    rows, columns   (out_features, in_features)
    pointers        data as int32 words, scale, zero, and the numbers of the codes where they are a table
    strides         from row to row: data in chunks of 16 bytes, scale and zero in elements
    copied          was some of it copied just now? Then no kernel may read it before the launch ahead of it is done
    """

    rows: int
    columns: int
    layout: Layout
    pointers: tuple[Tensor, Tensor, Tensor | None, Tensor | None]
    strides: tuple[int, int, int]
    copied: bool

    @property
    def step(self) -> int:
        """Codes that one chunk of the smallest plane covers."""
        return 16 * self.layout.fields

    @staticmethod
    def of(data: Tensor, scale: Tensor, zero: Tensor | None, spec: str, columns: int) -> Weight:
        """The weight behind an op's arguments, which `refuses_weight` has passed. Copies only what is misaligned."""
        parsed, layout = QSpec.parse(spec), Layout.of(spec)
        given = (data, scale, zero)
        if data.data_ptr() % 16 or data.stride(0) % 16 or data.stride(1) != 1:
            data = data.clone(memory_format=torch.contiguous_format)
        scale, scale_stride = _side(scale, parsed)
        zero, zero_stride = (None, 0) if zero is None else _side(zero, parsed)
        table = _table(parsed.element, data.device) if layout.table else None
        strides = (data.stride(0) // 16, scale_stride, zero_stride)
        copied = any(a is not b for a, b in zip(given, (data, scale, zero)))
        return Weight(data.shape[0], columns, layout, (data.view(torch.int32), scale, zero, table), strides, copied)

    def narrow(self, first: int, count: int) -> Weight:
        """The rows first … first + count - 1; first is a multiple of the rows that share their scales."""
        data, scale, zero, table = self.pointers
        if self.strides[1]:
            height = self.layout.height
            some = (0, first // height, -(-count // height))
            scale, zero = scale.narrow(*some), None if zero is None else zero.narrow(*some)
        return replace(self, rows=count, pointers=(data.narrow(0, first, count), scale, zero, table))


@functools.lru_cache(maxsize=64)
def _table(element: Element, device: torch.device) -> Tensor:
    assert element.table is not None
    return torch.tensor(element.table, device=device) * TABLE_SCALE


def _side(side: Tensor, spec: QSpec) -> tuple[Tensor, int]:
    if isinstance(spec.granularity, PerTensor):
        return side, 0
    if side.shape[1] > 1 and side.stride(1) != 1:
        side = side.contiguous()
    return side, side.stride(0)
