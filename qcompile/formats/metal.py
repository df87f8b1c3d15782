"""MLX's affine integers, as transformers' Metal kernels store them.

    P.weight             uint32 (out, in * bits/32), 2, 4 or 8 bits, low bits first
    P.scales, P.qbiases  (out, in/g): code * scale + qbias

transformers/integrations/metal_quantization.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._bits import fields
from qcompile.formats.stored import Read, Stored, finite
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor


class Metal:
    name = "metal"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name or bool(checkpoint.modules("qbiases"))

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        for module in checkpoint.modules("qbiases"):
            yield _affine(checkpoint, module)


def _affine(checkpoint: Checkpoint, module: str) -> Stored:
    weight, scales, qbiases = (f"{module}.{kind}" for kind in ("weight", "scales", "qbiases"))
    rows, words = checkpoint.need(weight, 2, torch.uint32).shape
    groups = checkpoint.need(scales, 2, (torch.float32, torch.float16, torch.bfloat16)).shape[1]
    checkpoint.need(scales, (rows, groups))
    checkpoint.need(qbiases, (rows, groups), (torch.float32, torch.float16, torch.bfloat16))
    # The files hold neither the inputs nor the bits, only their product.
    said = checkpoint.quantization.get("bits", 4)
    if said not in (2, 4, 8):
        raise CheckpointError(f"config.json says {said!r} bits; known: 2, 4, 8")
    columns = checkpoint.shapes[weight][-1] if weight in checkpoint.shapes else 32 * words // said
    bits = 32 * words // max(1, columns)
    if bits not in (2, 4, 8) or columns * bits != 32 * words or not groups or columns % groups:
        raise CheckpointError(
            f"{weight} is {(rows, words)} words in {groups} groups, which is no 2, 4 or 8 bits of {columns} inputs"
        )
    spec = QSpec.parse(f"u{bits}/g{columns // groups}/shift")

    def read(tensor: Read) -> QTensor:
        packed = tensor(weight).view(torch.int32)
        sides = (finite(name, tensor(name)) for name in (scales, qbiases))
        return QTensor.from_rows(spec, (rows, columns), lambda start, stop: fields(packed[start:stop], bits), *sides)

    return Stored(weight, spec, (rows, columns), (weight, scales, qbiases), read)
