"""BitNet b1.58 as transformers stores it: -1, 0 and 1 with one scale for all, and activations in 8 bits.

    P.weight        uint8 (out/4, in): bits 2i and 2i + 1 of row r are the code of row i * out/4 + r, which is value + 1
    P.weight_scale  (1,): divides what is multiplied with linear_class "bitlinear", multiplies it with "autobitlinear"

transformers/integrations/bitnet.py; https://arxiv.org/abs/2402.17764
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Read, Rounding, Stored, finite
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

SPEC = QSpec.parse("ternary/tensor/sym")
LINEAR_CLASSES = ("bitlinear", "autobitlinear")


class BitNet:
    name = "bitnet"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        kind = checkpoint.quantization.get("linear_class", "bitlinear")
        if kind not in LINEAR_CLASSES:
            raise CheckpointError(f"unknown linear_class {kind!r}; known: {', '.join(LINEAR_CLASSES)}")
        if norms := checkpoint.modules("rms_norm.weight"):
            raise CheckpointError(
                f"{norms[0]} normalizes its own input (rms_norm.weight), for which the architecture has no place"
            )
        modules = checkpoint.modules("weight_scale")
        if not modules:
            raise CheckpointError(
                "config.json says bitnet, and no weight is packed: this model rounds its float weights at every call "
                '(quantization_mode "online"); save it packed, or quantize it with qcompile.optimize'
            )
        for module in modules:
            yield _ternary(checkpoint, module, divides=kind == "bitlinear")


def _ternary(checkpoint: Checkpoint, module: str, divides: bool) -> Stored:
    weight, scale = f"{module}.weight", f"{module}.weight_scale"
    block, columns = checkpoint.need(weight, 2, torch.uint8).shape
    checkpoint.need(scale, (1,), (torch.float32, torch.float16, torch.bfloat16))
    shape = (4 * block, columns)

    def read(tensor: Read) -> QTensor:
        packed, number = tensor(weight), finite(scale, tensor(scale)).reshape(1, 1)
        if divides:
            if not number.all():
                raise CheckpointError(f"{scale} is 0 and divides")
            number = 1 / number.float()

        def codes(start: int, stop: int) -> Tensor:
            part = torch.cat(
                [(packed[max(start - i * block, 0) : max(stop - i * block, 0)] >> 2 * i) for i in range(4)]
            )
            if (part & 3 == 3).any():
                raise CheckpointError(f"{weight} holds the code 3; three values have 0, 1 and 2")
            return part & 3

        return QTensor.from_rows(SPEC, shape, codes, number)

    return Stored(weight, SPEC, shape, (weight, scale), read, Rounding("i8/token/dynamic/min(1e-05)"))
