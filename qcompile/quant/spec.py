"""QSpec: how to read the numbers of a quantized tensor, with one spelling that parses back."""

from __future__ import annotations

import enum
import functools
import re
from dataclasses import dataclass

from qcompile.errors import SpecError
from qcompile.quant.element import Element
from qcompile.quant.granularity import Granularity, parse_granularity
from qcompile.quant.packing import row_bytes


class Zero(enum.Enum):
    """The zero point: none, a float in units of codes (HQQ), an integer code (RTN, AWQ, GPTQ), or a float in units of
    the weight that is added after scaling (GGUF's minimum, quanto's shift)."""

    NONE = "sym"
    FLOAT = "asym"
    INT = "asym_int"
    SHIFT = "shift"

    @property
    def is_float(self) -> bool:
        return self in (Zero.FLOAT, Zero.SHIFT)


@dataclass(frozen=True)
class QSpec:
    """`value = (code - zero) * scale`, element by element; `code * scale + zero` where the zero point is a shift.

    Spelled `element/granularity/zero`, for example `u4/g64/asym` or `i8/row/sym`. Scales and zero points that are
    quantized themselves follow in parentheses: `u4/g64/asym/scale(u8/o128/asym)/zero(u8/tensor/asym)`. Unsigned codes
    without a zero point, `u6/g8/sym`, are for scales, which are positive.
    """

    element: Element
    granularity: Granularity
    zero: Zero
    scale_spec: QSpec | None = None
    zero_spec: QSpec | None = None

    def __post_init__(self) -> None:
        tag, kind = self.element.tag, self.zero.value
        if self.element.is_float and self.zero is not Zero.NONE:
            raise SpecError(f"{tag} is a float and has no zero point; write {tag}/{self.granularity}/sym")
        if tag[0] == "i" and tag != "iq4" and self.zero is not Zero.NONE:
            raise SpecError(f"{tag} has no zero point; write u{self.element.bits}/{self.granularity}/{kind}")
        if self.zero_spec and not self.zero.is_float:
            raise SpecError(f"zero({self.zero_spec}) quantizes a float zero point, and {kind} has none")

    def __str__(self) -> str:
        parts = [str(self.element), str(self.granularity), self.zero.value]
        if self.scale_spec:
            parts.append(f"scale({self.scale_spec})")
        if self.zero_spec:
            parts.append(f"zero({self.zero_spec})")
        return "/".join(parts)

    @staticmethod
    def parse(text: str) -> QSpec:
        """The spec that `text` spells; SpecError says which part is wrong."""
        return _parse(text)

    @property
    def offset(self) -> int:
        """The constant zero point of a symmetric spec."""
        return self.element.offset if self.zero is Zero.NONE else 0

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        return self.granularity.scale_shape(rows, columns)

    def nbytes(self, rows: int, columns: int, scale_itemsize: int) -> int:
        """Bytes of a packed (rows, columns) weight with its scales and zero points."""
        groups = self.scale_shape(rows, columns)

        def side(spec: QSpec | None, itemsize: int) -> int:
            return spec.nbytes(*groups, scale_itemsize) if spec else groups[0] * groups[1] * itemsize

        total = rows * row_bytes(columns, self.element.bits) + side(self.scale_spec, scale_itemsize)
        if self.zero is Zero.NONE:
            return total
        return total + side(self.zero_spec, 1 if self.zero is Zero.INT else scale_itemsize)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> QSpec:
    nested = dict(re.findall(r"/(scale|zero)(\((?:[^()]|\([^()]*\))*\))", text))
    plain = re.sub(r"/(?:scale|zero)\((?:[^()]|\([^()]*\))*\)", "", text)
    parts = plain.split("/")
    if len(parts) != 3:
        raise SpecError(f"{text!r} is not a spec; a spec is element/granularity/zero, such as u4/g64/asym")
    try:
        zero = Zero(parts[2])
    except ValueError:
        known = ", ".join(zero.value for zero in Zero)
        raise SpecError(f"{text!r}: unknown zero point {parts[2]!r}; known: {known}") from None
    sides = {f"{name}_spec": _parse(inner[1:-1]) for name, inner in nested.items()}
    spec = QSpec(Element.parse(parts[0]), parse_granularity(parts[1]), zero, **sides)
    if str(spec) != text:
        raise SpecError(f"{text!r} is spelled {str(spec)!r}")
    return spec
