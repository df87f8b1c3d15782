"""What one code means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import SpecError


@dataclass(frozen=True)
class Element:
    """What the codes 0 … levels-1 stand for.

    Integers: u1 … u8 are the codes themselves; i2 … i8 are centred, `code - offset` with half the range as offset, and
    have no zero point. `ternary` is three levels in two bits: -1, 0, 1 when symmetric, 0, 1, 2 with a zero point.

    Floats have no zero point either. Those of 8 bits are `dtype` seen as bytes; smaller ones look up `table`. Where the
    bits are a sign, `exponent` bits and `mantissa` bits, these say how many; the bias is as in IEEE 754,
    and codes that are `special` or more without their sign are inf or NaN (0: none are).
    """

    tag: str
    bits: int
    levels: int
    offset: int = 0
    table: tuple[float, ...] | None = None
    dtype: torch.dtype | None = None
    exponent: int = 0
    mantissa: int = 0
    special: int = 0

    def __str__(self) -> str:
        return self.tag

    @property
    def is_float(self) -> bool:
        return self.table is not None or self.dtype is not None

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1 if self.exponent else 0

    @staticmethod
    def parse(tag: str) -> Element:
        """The element with this tag; SpecError lists the known ones."""
        if element := ELEMENTS.get(tag):
            return element
        raise SpecError(f"unknown element {tag!r}; known: {', '.join(ELEMENTS)}")

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 codes as numbers of `dtype`, float32 or float64; integers before their offset is taken off."""
        if self.dtype == torch.float8_e8m0fnu:
            # Its bits are float32's exponent. Inductor's C++ has no such dtype.
            bits = codes.to(torch.int32) << 23
            return bits.masked_fill(codes == 0, 1 << 22).masked_fill(codes == 255, -1).view(torch.float32).to(dtype)
        if self.exponent:
            return self._decode_fields(codes.to(torch.int32)).to(dtype)
        if self.table is None:
            return codes.to(dtype)
        table = torch.tensor(self.table, dtype=dtype, device=codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(codes.shape)

    def _decode_fields(self, codes: Tensor) -> Tensor:
        """int32 codes of sign, exponent and mantissa as float32.

        Triton converts fp8 neither before sm_89 nor to float64. No denormal float32 is made on the way: compiled C++
        may take one for 0.
        """
        sign = 1 << (self.bits - 1)
        magnitude = codes & (sign - 1)
        normal = (magnitude << (23 - self.mantissa)) + ((127 - self.bias) << 23)
        if self.special:
            normal = torch.where(magnitude >= self.special, normal | 0x7F800000, normal)
        tiny = magnitude.to(torch.float32) * 2.0 ** (1 - self.bias - self.mantissa)
        value = torch.where(magnitude < 1 << self.mantissa, tiny, normal.view(torch.float32))
        return torch.where(codes & sign != 0, -value, value)


def _minifloat(tag: str, exponent: int, mantissa: int) -> Element:
    """A float of 1 + exponent + mantissa bits without inf and NaN (OCP MX specification 1.0)."""
    bits, bias, positive = 1 + exponent + mantissa, 2 ** (exponent - 1) - 1, []
    for code in range(2 ** (exponent + mantissa)):
        power, fraction = code >> mantissa, (code & (2**mantissa - 1)) / 2**mantissa
        positive.append(2.0 ** (power - bias) * (1 + fraction) if power else 2.0 ** (1 - bias) * fraction)
    table = (*positive, *(-value for value in positive))
    return Element(tag, bits, 2**bits, table=table, exponent=exponent, mantissa=mantissa)


# QLoRA (arXiv:2305.14314), appendix E.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# bitsandbytes' own 4-bit float, in twelfths.
_FP4_BNB = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
# ggml's IQ4_NL and IQ4_XS.
_IQ4 = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))

_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
ELEMENTS: dict[str, Element] = {
    element.tag: element
    for element in (
        *(Element(f"u{bits}", bits, 2**bits) for bits in _WIDTHS),
        *(Element(f"i{bits}", bits, 2**bits, offset=2 ** (bits - 1)) for bits in _WIDTHS[1:]),
        Element("ternary", 2, 3, offset=1),
        Element("fp8_e4m3", 8, 256, dtype=torch.float8_e4m3fn, exponent=4, mantissa=3, special=0x7F),
        Element("fp8_e5m2", 8, 256, dtype=torch.float8_e5m2, exponent=5, mantissa=2, special=0x7C),
        Element("e8m0", 8, 256, dtype=torch.float8_e8m0fnu),
        _minifloat("fp6_e2m3", 2, 3),
        _minifloat("fp6_e3m2", 3, 2),
        _minifloat("fp4_e2m1", 2, 1),
        Element("fp4_bnb", 4, 16, table=_FP4_BNB),
        Element("nf4", 4, 16, table=_NF4),
        Element("iq4", 4, 16, table=_IQ4),
    )
}
