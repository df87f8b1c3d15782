"""AWQ: 4-bit codes with integer zero points, in the orders of AutoAWQ's kernels and of llm-awq.

    gemm       qweight int32 (in, out/8), qzeros int32 (in/g, out/8), scales (in/g, out); codes interleaved in a word
    gemv       qweight int32 (out, in/8), qzeros int32 (out, Z), scales (out, 8 Z); groups padded
    gemv_fast  qweight int16 (out/4, in), qzeros or scaled_zeros (8 Z, out) holding -zero * scale, scales (8 Z, out)

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
from qcompile.formats.stored import Read, Stored
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Field of a word that holds its first, second, … code.
INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq:
    name = "awq"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return _qweight.method(checkpoint) == "awq"

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        for module in checkpoint.modules("qweight"):
            yield _gemm(checkpoint, module)


def _gemm(checkpoint: Checkpoint, module: str) -> Stored:
    qweight, qzeros, scales = (f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales"))
    columns, words = checkpoint.need(qweight, 2, torch.int32).shape
    groups = checkpoint.need(scales, 2).shape[0]
    if groups == 0 or columns % groups:
        raise CheckpointError(f"{module}: {groups} groups of scales do not divide {columns} inputs")
    checkpoint.need(scales, (groups, 8 * words))
    checkpoint.need(qzeros, (groups, words), torch.int32)
    spec = QSpec(Element.parse("u4"), PerGroup(columns // groups), Zero.INT)

    def read(tensor: Read) -> QTensor:
        packed = tensor(qweight)

        def codes(start: int, stop: int) -> Tensor:
            # A word holds eight outputs.
            rows = fields(packed[:, start // 8 : -(-stop // 8)], 4, INTERLEAVED).t()
            return rows[start % 8 : start % 8 + stop - start]

        zero = fields(tensor(qzeros), 4, INTERLEAVED).t().contiguous()
        return QTensor.from_rows(spec, (8 * words, columns), codes, tensor(scales).t().contiguous(), zero)

    return Stored(f"{module}.weight", spec, (8 * words, columns), (qweight, qzeros, scales), read)
