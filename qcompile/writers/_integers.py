"""A weight as the integer formats see it: unsigned codes, integer zero points, scales shared by neighbouring inputs.

AWQ, GPTQ, compressed-tensors and GGUF's simple blocks all hold this, in other orders. A spec comes to it by exact steps
only: scales are repeated for finer groups, codes are moved into more bits, a float zero point is one of the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.quant.element import Element
from qcompile.quant.granularity import PerBlock, PerGroup, PerRow, PerTensor
from qcompile.quant.packing import unpack
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor, reorder
from qcompile.writers.contents import Weight


class Unwritable(Exception):
    """Why a format cannot hold a weight exactly."""


@dataclass(frozen=True)
class Integers:
    """`(code - zero) * scale`, zero points being the middle of the codes where `zero` is None.

    bits   of a code
    size   inputs that share a scale, as the columns are stored
    scale  (rows, groups)
    zero   (rows, groups) uint8
    """

    tensor: QTensor
    bits: int
    size: int
    scale: Tensor
    zero: Tensor | None

    def codes(self) -> Tensor:
        """uint8 (rows, columns), with the columns in the weight's own order."""
        spec, order = self.tensor.spec, self.tensor.order
        codes = unpack(self.tensor.data, spec.element.bits, self.tensor.columns)
        if self.zero is None:
            codes = codes + (2 ** (self.bits - 1) - spec.offset)
        return codes if order is None else reorder(codes, order)

    def zeros(self) -> Tensor:
        """The zero points, also where they are all the middle."""
        return torch.full_like(self.scale, 2 ** (self.bits - 1), dtype=torch.uint8) if self.zero is None else self.zero


def integers(weight: Weight, widths: Sequence[int]) -> Integers:
    """The weight with codes of the first of `widths` bits that holds them. Raises Unwritable."""
    tensor, spec = weight.tensor, weight.spec
    if spec.element.is_float:
        raise Unwritable(f"{spec.element} codes are not integers")
    scale, size = by_inputs(tensor, tensor.scale)
    zero = None
    if not (spec.zero is Zero.NONE and spec.offset):
        zero = _zero(tensor, scale)
    needed = max(spec.element.bits, 0 if zero is None else int(zero.max()).bit_length())
    bits = next((width for width in widths if width >= needed), None)
    if bits is None:
        raise Unwritable(f"{needed}-bit codes; it holds at most {max(widths)} bits")
    return Integers(tensor, bits, size, scale, zero)


def by_inputs(tensor: QTensor, side: Tensor | QTensor) -> tuple[Tensor, int]:
    """Scales or zero points as (rows, groups), and how many inputs of a row share one. Raises Unwritable."""
    numbers, kind = plain(side), tensor.spec.granularity
    rows, columns = tensor.rows, tensor.columns
    match kind:
        case PerTensor():
            return numbers.expand(rows, 1), columns
        case PerRow():
            return numbers, columns
        case PerGroup(size) if columns % size == 0:
            return numbers, size
        case PerBlock(height, width) if columns % width == 0:
            return numbers.repeat_interleave(height, 0)[:rows], width
    raise Unwritable(f"scales by {kind} are not those of neighbouring inputs of a row of {columns}")


def shared_by(tensor: QTensor) -> int | None:
    """How many inputs of a row share a scale; None for other ways of sharing."""
    kind = tensor.spec.granularity
    if isinstance(kind, PerRow):
        return tensor.columns
    return kind.size if isinstance(kind, PerGroup) and tensor.columns % kind.size == 0 else None


def powers_of_two(side: Tensor | QTensor) -> Tensor | None:
    """Scales as their exponents plus 127, uint8; None where they are no powers of two."""
    numbers = plain(side).double()
    exponents = torch.log2(numbers).round() + 127
    fit = (exponents >= 0) & (exponents <= 254) & (2.0 ** (exponents - 127) == numbers)
    return exponents.to(torch.uint8) if bool(fit.all()) else None


def plain(side: Tensor | QTensor) -> Tensor:
    """Scales or zero points as floats that are not quantized themselves."""
    numbers = side.dequantize() if isinstance(side, QTensor) else side
    return numbers.float() if numbers.dtype.itemsize == 1 and numbers.dtype != torch.uint8 else numbers


def exactly(numbers: Tensor, dtype: torch.dtype, what: str = "scales") -> Tensor:
    """The same numbers as `dtype`. Raises Unwritable where that would change them."""
    made = numbers.to(dtype)
    if not torch.equal(made.double(), numbers.double()):
        moved = numbers[made.double() != numbers.double()]
        name = str(dtype).removeprefix("torch.")
        raise Unwritable(f"{moved.numel()} of {numbers.numel()} {what}, such as {moved[0].item():.9g}, are no {name}")
    return made


def linear_only(weight: Weight, transposed: bool = False, head: bool = True) -> None:
    """Raises Unwritable for what is no linear's weight."""
    no_codebooks(weight)
    if weight.kind == "embedding" or (weight.kind == "head" and not head):
        raise Unwritable(f"the {weight.kind} stays dense in it")
    if weight.kind == "other" or len(weight.tensor.shape) != 2:
        raise Unwritable("it holds linears' weights only")
    if weight.transposed and not transposed:
        raise Unwritable("it holds the weights of nn.Linear only, not transposed ones")


def no_codebooks(weight: Weight) -> None:
    """Raises Unwritable for what is no QTensor."""
    if not isinstance(weight.tensor, QTensor):
        raise Unwritable("its numbers are looked up in codebooks")


def weights_only(weight: Weight) -> None:
    """Raises Unwritable for rounded activations."""
    for side, rounding in (("inputs", weight.input), ("outputs", weight.output)):
        if rounding is not None:
            raise Unwritable(f"its {side} are rounded as {rounding.spec}, which it cannot say")


def in_order(weight: Weight) -> None:
    """Raises Unwritable for columns in an order of their own."""
    if weight.tensor.order is not None:
        raise Unwritable("its groups are not of neighbouring inputs (act-order); gptq holds them")


def nearest(weight: Weight, widths: Sequence[int], zero: Zero = Zero.INT, at_least: int = 1) -> QSpec | None:
    """Integers of no fewer bits than the weight's, in groups of its size if it has groups; None for no linear."""
    tensor, spec = weight.tensor, weight.spec
    if weight.kind not in ("linear", "head") or len(tensor.shape) != 2:
        return None
    bits = next((width for width in widths if width >= spec.element.bits), max(widths))
    own = spec.granularity.size if isinstance(spec.granularity, PerGroup) else spec.granularity
    sizes = [size for size in (own, 64, 32) if isinstance(size, int) and size >= at_least]
    size = next((size for size in sizes if tensor.columns % size == 0), None)
    by_row = size is None or isinstance(own, PerRow | PerTensor)
    granularity = PerRow() if by_row or size is None else PerGroup(size)
    symmetric = spec.zero is Zero.NONE and not spec.element.is_float and zero is Zero.INT
    element = Element.parse(f"{'i' if symmetric else 'u'}{bits}")
    return QSpec(element, granularity, Zero.NONE if symmetric else zero)


def _zero(tensor: QTensor, scale: Tensor) -> Tensor:
    """Zero points as codes, (rows, groups) uint8. Raises Unwritable where they are none."""
    kind = tensor.spec.zero
    if kind is Zero.NONE:
        return torch.zeros_like(scale, dtype=torch.uint8)
    assert tensor.zero is not None
    given, _ = by_inputs(tensor, tensor.zero)
    if kind is Zero.INT:
        return given
    numbers = given.double()
    if kind is Zero.SHIFT:
        # code * scale + shift is (code - zero) * scale, rounded once, where the products fit into float32.
        if scale.dtype.itemsize != 2:
            raise Unwritable("its zero points are added to products that are rounded")
        numbers = torch.where(scale == 0, 0, (-numbers / scale.double()).round())
        if not torch.equal(numbers * scale.double(), -given.double()):
            raise Unwritable("its zero points lie between codes")
    if bool((numbers != numbers.round()).any() or (numbers < 0).any() or (numbers > 255).any()):
        odd = numbers[(numbers != numbers.round()) | (numbers < 0) | (numbers > 255)][0].item()
        raise Unwritable(f"its zero points are floats, such as {odd:.6g}, that are no codes")
    return numbers.to(torch.uint8)
