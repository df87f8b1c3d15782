"""AWQ: 4-bit codes with integer zero points, in the orders of AutoAWQ's kernels and of llm-awq.

    gemm       qweight int32 (in, out/8), qzeros int32 (in/g, out/8), scales (in/g, out); codes interleaved in a word
    gemv       qweight int32 (out, in/8), qzeros int32 (out, Z), scales (out, 8 Z); groups padded with zeros
    gemv_fast  qweight int16 (out/4, in), qzeros or scaled_zeros (8 Z, out) holding -zero * scale in 16 bits,
               scales (8 Z, out)

AMD Quark writes gemm too, with three turns of its own: `pack_method` "order" does not interleave, without zero points
the codes are signed, and a float weight may be called qweight as well.

https://github.com/casper-hansen/AutoAWQ (awq/modules/linear), https://github.com/mit-han-lab/llm-awq
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats import _qweight
from qcompile.formats._bits import fields
from qcompile.formats.stored import Dense, Read, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Field of a word that holds its first, second, … code.
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
IN_ORDER = tuple(range(8))


class Awq:
    name = "awq"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return _qweight.method(checkpoint) == "awq"

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored | Dense]:
        config, packed = checkpoint.quantization, False
        export = config.get("export")
        said = config.get("pack_method") or (export.get("pack_method") if isinstance(export, dict) else None)
        order = IN_ORDER if said == "order" else INTERLEAVED
        for module in checkpoint.modules("qweight"):
            match _qweight.layout(checkpoint, module):
                case None:
                    yield Dense(f"{module}.weight", f"{module}.qweight")
                    continue
                case "gemm":
                    yield _gemm(checkpoint, module, order, signed=config.get("zero_point") is False)
                case "gemv":
                    yield _gemv(checkpoint, module)
                case "gemv_fast":
                    yield _gemv_fast(checkpoint, module)
                case _:
                    raise CheckpointError(f"{module} has GPTQ's layout, others have AWQ's")
            packed = True
        if not packed:
            raise _qweight.none_packed(checkpoint, self.name)


def _gemm(checkpoint: Checkpoint, module: str, order: tuple[int, ...], signed: bool) -> Stored:
    qweight, qzeros, scales = (f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    columns, words = checkpoint.need(qweight, 2, torch.int32).shape
    groups = checkpoint.need(scales, (checkpoint.need(scales, 2).shape[0], 8 * words), _qweight.SCALES).shape[0]
    checkpoint.need(qzeros, (groups, words), torch.int32)
    granularity = _qweight.groups_of(_size(module, columns, groups), columns)
    # Signed codes come with zero points that say nothing.
    signed = signed and not checkpoint.read(qzeros).any()
    spec = QSpec(Element.parse("i4" if signed else "u4"), granularity, Zero.NONE if signed else Zero.INT)

    def read(tensor: Read) -> QTensor:
        packed = tensor(qweight)

        def codes(start: int, stop: int) -> Tensor:
            # A word holds eight outputs.
            rows = fields(packed[:, start // 8 : -(-stop // 8)], 4, order).t()[start % 8 : start % 8 + stop - start]
            return rows ^ 8 if signed else rows

        scale = finite(scales, tensor(scales)).t().contiguous()
        zero = None if signed else fields(tensor(qzeros), 4, order).t().contiguous()
        return QTensor.from_rows(spec, (8 * words, columns), codes, scale, zero)

    return Stored(f"{module}.weight", spec, (8 * words, columns), (qweight, qzeros, scales), read)


def _gemv(checkpoint: Checkpoint, module: str) -> Stored:
    qweight, qzeros, scales = (f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    rows, words = checkpoint.need(qweight, 2, torch.int32).shape
    padded = checkpoint.need(qzeros, 2, torch.int32).shape[1]
    checkpoint.need(qzeros, (rows, padded))
    checkpoint.need(scales, (rows, 8 * padded), _qweight.SCALES)
    groups = _without_padding(checkpoint.read(scales))
    spec = QSpec(Element.parse("u4"), _qweight.groups_of(_size(module, 8 * words, groups), 8 * words), Zero.INT)

    def read(tensor: Read) -> QTensor:
        packed = tensor(qweight)

        def codes(start: int, stop: int) -> Tensor:
            return fields(packed[start:stop], 4)

        scale = finite(scales, tensor(scales))[:, :groups].contiguous()
        zero = fields(tensor(qzeros), 4)[:, :groups].contiguous()
        return QTensor.from_rows(spec, (rows, 8 * words), codes, scale, zero)

    return Stored(f"{module}.weight", spec, (rows, 8 * words), (qweight, qzeros, scales), read)


def _gemv_fast(checkpoint: Checkpoint, module: str) -> Stored:
    qweight, scales = f"{module}.qweight", f"{module}.scales"
    zeros = f"{module}.scaled_zeros" if f"{module}.scaled_zeros" in checkpoint.tensors else f"{module}.qzeros"
    quarter, columns = checkpoint.need(qweight, 2, torch.int16).shape
    padded = checkpoint.need(scales, 2, _qweight.SCALES).shape[0]
    checkpoint.need(scales, (padded, 4 * quarter))
    checkpoint.need(zeros, (padded, 4 * quarter), _qweight.SCALES)
    if columns % 64:
        raise CheckpointError(f"{qweight} is {(quarter, columns)}; this layout has blocks of 64 inputs")
    groups = _without_padding(checkpoint.read(scales).t())
    granularity = _qweight.groups_of(_size(module, columns, groups), columns)
    sides = [checkpoint.read(name)[:groups] for name in (scales, zeros)]
    spec = QSpec(Element.parse("u4"), granularity, Zero.SHIFT if _zeros(*sides) is None else Zero.INT)

    def read(tensor: Read) -> QTensor:
        packed = tensor(qweight)

        def codes(start: int, stop: int) -> Tensor:
            # 64 words of a row are 4 outputs of 64 inputs; in 32 inputs, place 4 i + j holds input 8 j + i.
            blocks = fields(packed[start // 4 : -(-stop // 4)], 4).reshape(-1, columns // 64, 4, 2, 8, 4)
            rows = blocks.transpose(-1, -2).transpose(1, 2).reshape(-1, columns)
            return rows[start % 4 : start % 4 + stop - start]

        scale, shift = (finite(name, tensor(name))[:groups].t().contiguous() for name in (scales, zeros))
        zero = shift if spec.zero is Zero.SHIFT else _zeros(scale, shift)
        return QTensor.from_rows(spec, (4 * quarter, columns), codes, scale, zero)

    return Stored(f"{module}.weight", spec, (4 * quarter, columns), (qweight, zeros, scales), read)


def _zeros(scale: Tensor, shift: Tensor) -> Tensor | None:
    """The integers that were multiplied by -scale and rounded to 16 bits, which undoes that rounding; None if there are
    no such integers."""
    zero = (-shift.float() / scale.float()).round()
    exact = ((zero * scale.float()).to(shift.dtype) == -shift) & (zero >= 0) & (zero < 16)
    return zero.to(torch.uint8) if bool(exact.all()) else None


def _size(module: str, columns: int, groups: int) -> int:
    if groups == 0 or columns == 0 or columns % groups:
        raise CheckpointError(f"{module}: {groups} groups of scales do not divide {columns} inputs")
    return columns // groups


def _without_padding(scale: Tensor) -> int:
    """How many groups there are: rows of scales are padded with zeros for the kernel's sake."""
    used = scale.ne(0).any(0).nonzero()
    return int(used.max()) + 1 if used.numel() else 0
