"""A packed weight as the arguments that our C++ takes (kernels/cpu), compiled once for each kind of code."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.kernels._cpp import load_cpp, processor_features, text_of
from qcompile.kernels._weight import refuses_weight
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerBlock, PerTensor
from qcompile.quant.packing import row_bytes
from qcompile.quant.spec import QSpec, Zero

# Put together into one text, in this order.
SOURCES = (
    "vectors.h",
    "team.h",
    "codes.h",
    "dequantize.h",
    "fields.h",
    "fixed_rows.h",
    "few_rows_dot.h",
    "few_rows.h",
    "panels.h",
    "sides.h",
    "many_codes.h",
    "bf16_units.h",
    "many_rows_dot.h",
    "many_rows.h",
    "tiles.h",
    "many_rows_tiles.h",
    "many_codes_tiles.h",
)

# enum Kind in codes.h
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
ADDED = 8  # beside the kind of a zero point that is added after scaling
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Fewer codes times rows than this are not worth waking a thread for.
WORK_OF_A_THREAD = 1 << 16


def refuses(x: Tensor, dtype: torch.dtype, scale: Tensor, zero: Tensor | None, spec: str, columns: int) -> str | None:
    """Why our C++ cannot read this weight, or compute where `x` is in `dtype`, or None."""
    if x.device.type != "cpu":
        return f"needs cpu, got {x.device.type}"
    if dtype not in FLOATS:
        return f"handles float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if columns == 0:
        return "no inputs"
    granularity = QSpec.parse(spec).granularity
    if isinstance(granularity, PerBlock) and columns % granularity.width and granularity.width < columns:
        return f"{spec}: the last tiles are cut off, {granularity.width} does not divide {columns}"
    return refuses_weight(scale, zero, spec, columns) or missing(QSpec.parse(spec).element)


@functools.cache
def missing(element: Element) -> str | None:
    """Why the library for this element cannot be had, or None. Compiles it where that was never done (seconds)."""
    try:
        library(_defines(element))
    except RuntimeError as error:
        return f"C++ does not compile here: {error}"
    return None


def matrix_instructions(element: Element) -> str | None:
    """Who uses the processor's matrix instructions for codes of this element, in words; None where it has none."""
    if "amx_bf16" not in processor_features() or missing(element) is not None:
        return None
    if library(_defines(element)).has_tiles():
        return "AMX multiplies many rows in bfloat16, or of codes of 8 bits"
    return "AMX through torch alone: the system, or the C++ compiler, does not give it to us"


def _defines(element: Element) -> str:
    """What the C++ is told about an element; integers of one width, with or without a sign, are one."""
    lines = [f"#define BITS {element.bits}"]
    if element.table is not None and element.bits == 4:
        lines.append("#define TABLE {" + ", ".join(f"{number!r}f" for number in map(float, element.table)) + "}")
    elif element.is_float:
        fields = {"EXPONENT": element.exponent, "MANTISSA": element.mantissa, "BIAS": element.bias}
        lines += [f"#define {name} {number}" for name, number in fields.items()]
    return "\n".join(lines) + "\n"


@functools.cache
def library(defines: str) -> ctypes.CDLL:
    """The compiled functions for codes of an element."""
    found = load_cpp(defines + text_of(*SOURCES))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    weight = [*[pointer] * 3, *[size] * 7, number, number, ctypes.c_float]
    x_and_y = [pointer, size, size, number, pointer, pointer, number, number]
    found.dequantize.argtypes, found.dequantize.restype = [*weight, pointer, number, number], None
    found.few_rows.argtypes, found.few_rows.restype = [*weight, *x_and_y], None
    found.many_rows.argtypes, found.many_rows.restype = [*weight, *x_and_y], None
    found.many_rows_tiles.argtypes, found.many_rows_tiles.restype = [*weight, *x_and_y], None
    codes_and_y = [pointer, pointer, size, *x_and_y[3:]]
    found.many_codes.argtypes, found.many_codes.restype = [*weight, *codes_and_y], None
    found.many_codes_tiles.argtypes, found.many_codes_tiles.restype = [*weight, *codes_and_y], None
    found.has_many_rows.argtypes, found.has_many_rows.restype = [], number
    found.has_many_rows_dot.argtypes, found.has_many_rows_dot.restype = [], number
    found.has_many_codes.argtypes, found.has_many_codes.restype = [], number
    found.has_tiles.argtypes, found.has_tiles.restype = [], number
    found.has_many_codes_tiles.argtypes, found.has_many_codes_tiles.restype = [size, size], number
    found.has_dot.argtypes, found.has_dot.restype = [size, size], number
    return found


@dataclass(frozen=True)
class Reader:
    """How to read weights of one spec with `columns` inputs, worked out once.

    share_few_rows  few_rows as C++ calls it, in each thread of a team
    many_rows   None where this processor has no such kernel
    many_codes  the same for rows of codes
    many_rows_tiles   the same by matrix instructions, for rows in bfloat16
    many_codes_tiles  the same by matrix instructions
    has_dot     does few_rows multiply numbers of 16 bits as integers?
    has_many_rows_dot  does many_rows multiply some rows in bfloat16 without transposing codes?
    group       inputs that share a scale
    height      rows that share their scales
    by_row      does each row, or each `height` rows, have scales of their own?
    added       is the zero point added after scaling?
    offset      the zero point of a symmetric spec
    """

    dequantize: Callable[..., None]
    few_rows: Callable[..., None]
    share_few_rows: Callable[..., None]
    many_rows: Callable[..., None] | None
    many_codes: Callable[..., None] | None
    many_rows_tiles: Callable[..., None] | None
    many_codes_tiles: Callable[..., None] | None
    has_dot: bool
    has_many_rows_dot: bool
    columns: int
    group: int
    groups: int
    height: int
    by_row: bool
    added: bool
    bytes: int
    offset: float

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def of(spec: str, columns: int) -> Reader:
        parsed = QSpec.parse(spec)
        groups = parsed.scale_shape(1, columns)[1]
        found = library(_defines(parsed.element))
        return Reader(
            dequantize=found.dequantize,
            few_rows=found.few_rows,
            share_few_rows=found.share_few_rows,
            many_rows=found.many_rows if found.has_many_rows() else None,
            many_codes=found.many_codes if found.has_many_codes() else None,
            many_rows_tiles=found.many_rows_tiles if found.has_tiles() else None,
            many_codes_tiles=found.many_codes_tiles if found.has_many_codes_tiles(columns, columns // groups) else None,
            has_dot=bool(found.has_dot(columns, columns // groups)),
            has_many_rows_dot=bool(found.has_many_rows_dot()),
            columns=columns,
            group=columns // groups,
            groups=groups,
            height=parsed.granularity.height if isinstance(parsed.granularity, PerBlock) else 1,
            by_row=not isinstance(parsed.granularity, PerTensor),
            added=parsed.zero is Zero.SHIFT,
            bytes=row_bytes(columns, parsed.element.bits),
            offset=float(parsed.offset),
        )

    def arguments(self, data: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Any, ...]:
        """WEIGHT_ARGUMENTS in codes.h. Raises FormatError where a shape would make them read elsewhere."""
        rows, length = data.shape
        scales = (-(-rows // self.height) if self.by_row else 1, self.groups)
        if length != self.bytes or scale.shape != scales or (zero is not None and zero.shape != scales):
            sides = [tuple(side.shape) for side in (data, scale, zero) if side is not None]
            raise FormatError(f"data, scale and zero of ({rows}, {self.columns}) cannot be {sides}")
        return (
            data.data_ptr(),
            scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            rows,
            self.columns,
            self.group,
            self.height,
            data.stride(0),
            scale.stride(0) if self.by_row else 0,
            zero.stride(0) if zero is not None and self.by_row else 0,
            KINDS[scale.dtype],
            0 if zero is None else KINDS[zero.dtype] | (ADDED if self.added else 0),
            self.offset,
        )


def with_dense_rows(side: Tensor) -> Tensor:
    """`side`, copied if the numbers in a row are not neighbours. Rows may lie apart."""
    return side if side.stride(1) == 1 or side.shape[1] == 1 else side.contiguous()


def threads(work: int) -> int:
    """How many threads `work` codes times rows deserve, at most torch's own number."""
    return min(torch.get_num_threads(), 1 + work // WORK_OF_A_THREAD)
