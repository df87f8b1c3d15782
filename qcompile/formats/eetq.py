"""EETQ: int8 rows in the order of its CUTLASS kernel, which is the same for GPUs from sm75 to sm89.

    P.weight (P.qweight by EETQ's own tool)  int8 with the shape (in, out), though its bytes lie otherwise
    P.weight_scales                          float16 (out,): the largest magnitude of a row / 128

The bytes: out major; two outputs side by side in turns of 64 inputs; 128 added; the inputs of every 16 in the order
0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15; the middle bytes of every four exchanged. The files do not say for which GPU they
were made: those of sm70 have only the last step, and would be read wrongly.
https://github.com/NetEase-FuXi/EETQ (csrc/cutlass_kernels/cutlass_preprocessors.cc)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Read, Stored, finite
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

SPEC = QSpec.parse("i8/row/sym")
RUN = 64
INPUTS = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
# Where in 16 stored bytes the inputs 0 … 15 lie: byte b holds place b with the middle two of four exchanged.
PLACES = [(place & ~3) | (0, 2, 1, 3)[place & 3] for place in (INPUTS.index(n) for n in range(16))]


class Eetq:
    name = "eetq"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name or any(
            checkpoint.tensors[name].dtype == torch.int8
            for module in checkpoint.modules("weight_scales")
            for name in (f"{module}.weight", f"{module}.qweight")
            if name in checkpoint.tensors
        )

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        for module in checkpoint.modules("weight_scales"):
            yield _rows(checkpoint, module)


def _rows(checkpoint: Checkpoint, module: str) -> Stored:
    weight, scales = f"{module}.weight", f"{module}.weight_scales"
    if weight not in checkpoint.tensors and f"{module}.qweight" in checkpoint.tensors:
        weight = f"{module}.qweight"
    columns, rows = checkpoint.need(weight, 2, torch.int8).shape
    checkpoint.need(scales, (rows,), (torch.float16, torch.bfloat16, torch.float32))
    if columns % RUN or rows % 2:
        raise CheckpointError(f"{weight} is {(columns, rows)}; EETQ's order needs inputs by {RUN} and outputs by 2")

    def read(tensor: Read) -> QTensor:
        pairs = tensor(weight).view(torch.uint8).reshape(rows // 2, columns // RUN, 2, RUN)

        def codes(start: int, stop: int) -> Tensor:
            # The 128 that EETQ adds is the offset of our codes, too.
            stored = pairs[start // 2 : -(-stop // 2)].transpose(1, 2).reshape(-1, columns // 16, 16)
            return stored[..., PLACES].reshape(-1, columns)[start % 2 : start % 2 + stop - start]

        return QTensor.from_rows(SPEC, (rows, columns), codes, finite(scales, tensor(scales)).reshape(-1, 1))

    return Stored(f"{module}.weight", SPEC, (rows, columns), (weight, scales), read)
