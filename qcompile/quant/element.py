"""What one code means."""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import SpecError


@dataclass(frozen=True)
class Element:
    """An integer element. Codes are stored as 0 … levels-1; the number a code stands for is `code - offset`.

    u1 … u8 have offset 0 and need a zero point; i2 … i8 are centred (offset = half the range) and have none.
    `ternary` is three levels in two bits: -1, 0, 1 when symmetric, 0, 1, 2 with a zero point.
    """

    tag: str
    bits: int
    levels: int
    offset: int

    def __str__(self) -> str:
        return self.tag

    @staticmethod
    def parse(tag: str) -> Element:
        """The element with this tag; SpecError lists the known ones."""
        if element := ELEMENTS.get(tag):
            return element
        raise SpecError(f"unknown element {tag!r}; known: {', '.join(ELEMENTS)}")


_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8)
ELEMENTS: dict[str, Element] = {
    **{f"u{bits}": Element(f"u{bits}", bits, 2**bits, 0) for bits in _WIDTHS},
    **{f"i{bits}": Element(f"i{bits}", bits, 2**bits, 2 ** (bits - 1)) for bits in _WIDTHS[1:]},
    "ternary": Element("ternary", 2, 3, 1),
}
