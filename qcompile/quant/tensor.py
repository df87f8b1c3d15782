"""QTensor: a quantized weight as plain tensors plus the spec that reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.packing import pack, row_bytes, unpack
from qcompile.quant.spec import QSpec, Zero


@dataclass(frozen=True)
class QTensor:
    """A quantized weight.

    spec    how to read the numbers
    shape   logical shape, (out_features, in_features); more leading dimensions count as rows
    data    uint8 (rows, packed bytes), see packing.py
    scale   floating tensor of spec.scale_shape(rows, columns), or a QTensor of that shape
    zero    like scale for a float zero point, uint8 for an integer one, None when symmetric

    Raises FormatError when a shape or dtype differs from what the spec needs; the message names both.
    """

    spec: QSpec
    shape: tuple[int, ...]
    data: Tensor
    scale: Tensor | QTensor
    zero: Tensor | QTensor | None = None

    def __post_init__(self) -> None:
        if not self.shape:
            raise FormatError(f"{self._what}: a quantized weight has at least one dimension")
        groups = self.spec.scale_shape(self.rows, self.columns)
        self._check("data", self.data.shape, (self.rows, row_bytes(self.columns, self.spec.element.bits)))
        self._check("scale", self.scale.shape, groups)
        if self.data.dtype != torch.uint8:
            raise FormatError(f"{self._what}: data is {self.data.dtype}, packed codes are torch.uint8")
        self._check_numbers("scale", self.scale, self.spec.scale_spec)
        if (self.zero is None) != (self.spec.zero is Zero.NONE):
            raise FormatError(f"{self._what}: zero is {'missing' if self.zero is None else 'not expected'}")
        if self.zero is None:
            return
        self._check("zero", self.zero.shape, groups)
        if self.spec.zero is Zero.FLOAT:
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
        return self.data.nbytes + self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)

    @staticmethod
    def from_codes(spec: QSpec, codes: Tensor, scale: Tensor | QTensor, zero: Tensor | QTensor | None) -> QTensor:
        """Pack (…, columns) uint8 codes; scale and zero are as in the class."""
        rows = codes.reshape(-1, codes.shape[-1])
        return QTensor(spec, tuple(codes.shape), pack(rows, spec.element.bits), scale, zero)

    def codes(self) -> Tensor:
        """The codes, uint8, in the logical shape."""
        return unpack(self.data, self.spec.element.bits, self.columns).reshape(self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in its logical shape; computed in float32 (float64 for a float64 result), rounded once."""
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        scale = self.scale.dequantize(compute) if isinstance(self.scale, QTensor) else self.scale.to(compute)
        zero = self.zero.dequantize(compute) if isinstance(self.zero, QTensor) else self.zero
        return dequantize(self.data, scale, zero, self.spec, self.shape, dtype)

    def to(self, device: torch.device | str) -> QTensor:
        """The same tensor on another device. Scales keep their dtype."""
        moved = {name: part.to(device) for name, part in self.parts().items()}
        return replace(self, **moved)

    def parts(self) -> dict[str, Tensor | QTensor]:
        """The stored pieces by field name, without absent ones."""
        parts: dict[str, Tensor | QTensor] = {"data": self.data, "scale": self.scale}
        return parts if self.zero is None else {**parts, "zero": self.zero}


def dequantize(
    data: Tensor, scale: Tensor, zero: Tensor | None, spec: QSpec, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """(code - zero) * scale in float32 (float64 for float64), then rounded to `dtype`; result has `shape`."""
    rows, columns = data.shape[0], shape[-1]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    values = unpack(data, spec.element.bits, columns).to(compute)

    def spread(side: Tensor) -> Tensor:
        return spec.granularity.spread(side.to(compute), rows, columns)

    shift = spread(zero) if zero is not None else spec.offset
    return ((values - shift) * spread(scale)).to(dtype).reshape(shape)
