"""QTensor: a quantized weight as plain tensors plus the spec that reads them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.packing import pack, row_bytes, unpack
from qcompile.quant.spec import QSpec, Zero

# Codes that are unpacked at once while a weight is repacked: 512 KiB, which stay in a CPU's cache. On one core of an
# EPYC a code of GGUF's Q4_K took 1.2 ns in pieces of 256 KiB, 3.2 ns in pieces of 16 MiB.
SLICE = 1 << 19


@dataclass(frozen=True)
class QTensor:
    """A quantized weight.

    spec    how to read the numbers
    shape   logical shape, (out_features, in_features); more leading dimensions count as rows
    data    uint8 (rows, packed bytes), see packing.py
    scale   floating tensor of spec.scale_shape(rows, columns), or a QTensor of that shape
    zero    like scale for a float zero point or a shift, uint8 for an integer one, None when symmetric
    order   int64 (columns,) or None: stored column j is column order[j] of the weight (GPTQ's act-order, with the
            columns of a group brought together)

    Raises FormatError when a shape or dtype differs from what the spec needs; the message names both.
    """

    spec: QSpec
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | QTensor
    zero: Tensor | QTensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.shape:
            raise FormatError(f"{self._what}: a quantized weight has at least one dimension")
        groups = self.spec.scale_shape(self.rows, self.columns)
        self._check("data", self.data.shape, (self.rows, row_bytes(self.columns, self.spec.element.bits)))
        self._check("scale", self.scale.shape, groups)
        if self.data.dtype != torch.uint8:
            raise FormatError(f"{self._what}: data is {self.data.dtype}, packed codes are torch.uint8")
        self._check_numbers("scale", self.scale, self.spec.scale_spec)
        self._check_order()
        if (self.zero is None) != (self.spec.zero is Zero.NONE):
            raise FormatError(f"{self._what}: zero is {'missing' if self.zero is None else 'not expected'}")
        if self.zero is None:
            return
        self._check("zero", self.zero.shape, groups)
        if self.spec.zero.is_float:
            self._check_numbers("zero", self.zero, self.spec.zero_spec)
        elif isinstance(self.zero, QTensor) or self.zero.dtype != torch.uint8:
            got = "quantized" if isinstance(self.zero, QTensor) else self.zero.dtype
            raise FormatError(f"{self._what}: zero is {got}, integer zero points are torch.uint8")

    def _check_numbers(self, name: str, numbers: Tensor | QTensor, spec: QSpec | None) -> None:
        if isinstance(numbers, QTensor):
            if numbers.spec != spec:
                raise FormatError(f"{self._what}: {name} is quantized as {numbers.spec}, not as {spec}")
        elif spec:
            raise FormatError(f"{self._what}: {name} is {numbers.dtype}, not quantized as {spec}")
        elif not numbers.dtype.is_floating_point:
            raise FormatError(f"{self._what}: {name} is {numbers.dtype}, not a floating dtype")

    def _check_order(self) -> None:
        if self.order is None:
            return
        self._check("order", self.order.shape, (self.columns,))
        if self.order.dtype != torch.int64:
            raise FormatError(f"{self._what}: order is {self.order.dtype}, not torch.int64")
        places = torch.arange(self.columns, device=self.order.device)
        if not self.order.is_meta and not torch.equal(self.order.sort().values, places):
            raise FormatError(f"{self._what}: order is no permutation of its {self.columns} columns")

    def _check(self, name: str, got: tuple[int, ...], needs: tuple[int, ...]) -> None:
        if tuple(got) != tuple(needs):
            raise FormatError(f"{self._what} needs {name} {tuple(needs)}, got {tuple(got)}")

    @property
    def _what(self) -> str:
        return f"{self.spec} of shape {tuple(self.shape)}"

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    @staticmethod
    def from_codes(spec: QSpec, codes: Tensor, scale: Tensor | QTensor, zero: Tensor | QTensor | None) -> QTensor:
        """Pack (…, columns) uint8 codes; scale and zero are as in the class."""
        rows = codes.reshape(-1, codes.shape[-1])
        return QTensor(spec, tuple(codes.shape), pack(rows, spec.element.bits), scale, zero)

    @staticmethod
    def from_rows(
        spec: QSpec,
        shape: tuple[int, ...],
        codes: Callable[[int, int], Tensor],
        scale: Tensor | QTensor,
        zero: Tensor | QTensor | None = None,
        order: Tensor | None = None,
    ) -> QTensor:
        """Pack codes asked for by slices of rows: `codes(start, stop)` → (stop - start, columns) uint8.

        So the codes of a large weight, eight times their packed bits, never exist at once. The data lies where the
        codes do.
        """
        rows, columns = math.prod(shape[:-1]), shape[-1]
        step, data = max(1, SLICE // max(1, columns)), None
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            packed = pack(codes(start, stop), spec.element.bits)
            if data is None:
                data = packed.new_empty(rows, packed.shape[1])
            data[start:stop] = packed
        if data is None:
            raise FormatError(f"{spec} of shape {shape}: a weight without rows")
        return QTensor(spec, shape, data, scale, zero, order)

    def codes(self) -> Tensor:
        """The codes, uint8, in the logical shape, with the columns as they are stored."""
        return unpack(self.data, self.spec.element.bits, self.columns).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in its logical shape; in float32 (float64 for a float64 result or scale), rounded once."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scale = self.scale.dequantize(compute) if isinstance(self.scale, QTensor) else self.scale
        zero = self.zero.dequantize(compute) if isinstance(self.zero, QTensor) else self.zero
        weight = dequantize(self.data, scale, zero, self.spec, self.shape, dtype)
        return weight if self.order is None else reorder(weight, self.order)

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device. Scales keep their dtype."""
        moved = {name: part.to(device) for name, part in self.parts().items()}
        return replace(self, **moved)

    def parts(self) -> dict[str, Tensor | QTensor]:
        """The stored pieces by field name, without absent ones."""
        parts: dict[str, Tensor | QTensor] = {"data": self.data, "scale": self.scale}
        if self.zero is not None:
            parts["zero"] = self.zero
        if self.order is not None:
            parts["order"] = self.order
        return parts


def reorder(weight: Tensor, order: Tensor) -> Tensor:
    """Stored columns in their places: column order[j] of the result is column j of `weight`."""
    return weight.index_select(-1, torch.argsort(order))


def dequantize(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: QSpec, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """The numbers in float32 (float64 for a float64 result or scale), then rounded to `dtype`; result has `shape`."""
    rows, columns = data.shape[0], shape[-1]
    compute = torch.float64 if torch.float64 in (dtype, scale.dtype) else torch.float32
    values = spec.element.decode(unpack(data, spec.element.bits, columns), compute)

    def spread(side: Tensor) -> Tensor:
        return spec.granularity.spread(side.to(compute), rows, columns)

    if spec.zero is Zero.SHIFT:
        assert zero is not None
        return (values * spread(scale) + spread(zero)).to(dtype).reshape(shape)
    shift = spread(zero) if zero is not None else spec.offset
    return ((values - shift) * spread(scale)).to(dtype).reshape(shape)
