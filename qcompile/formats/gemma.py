"""Gemma's integer checkpoints: 2, 4 or 8 bits with a scale a row, and static 8-bit activations.

    P.weight               uint8 (out, in/2 or in/4), low bits first, value + 8 or + 2; or int8 (out, in)
    P.weight_scale         float32 (out, 1)
    P.embedding_quantized  a table in the same way, P.embedding_scale (rows, 1) or by groups
    P.input_activation_scale, P.output_activation_scale   float32 (), 0 where activations stay as they are
    k_cache_scale, v_cache_scale   not used by the model

transformers/integrations/gemma_quant.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._bits import fields
from qcompile.formats._scaled import cache_scales
from qcompile.formats.stored import Entry, Read, Rounding, Stored, finite
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor

SCALES = (torch.float32, torch.float16, torch.bfloat16)


class Gemma:
    name = "gemma"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name

    def weights(self, checkpoint: Checkpoint) -> Iterator[Entry]:
        for module in checkpoint.modules("weight_scale"):
            yield _integers(checkpoint, module, "weight", "weight_scale")
        for module in checkpoint.modules("embedding_quantized"):
            yield _integers(checkpoint, module, "embedding_quantized", "embedding_scale")
        yield from cache_scales(checkpoint, None)


def _integers(checkpoint: Checkpoint, module: str, codes_name: str, scale_name: str) -> Stored:
    path, data, scale = f"{module}.weight", f"{module}.{codes_name}", f"{module}.{scale_name}"
    info = checkpoint.need(data, 2, (torch.uint8, torch.int8))
    (rows, width), groups = info.shape, checkpoint.need(scale, 2, SCALES).shape[1]
    checkpoint.need(scale, (rows, groups))
    said = checkpoint.quantization.get("num_bits", 4)
    columns = checkpoint.shapes[path][-1] if path in checkpoint.shapes else width * (2 if said == 4 else 4)
    if info.dtype == torch.int8:
        bits, columns = 8, width
    else:
        fitting = [bits for bits in (4, 2) if width == -(-columns * bits // 8)]
        if not fitting:
            raise CheckpointError(f"{data} is {info.shape}; {columns} inputs in 4 or 2 bits have another width")
        bits = said if said in fitting else fitting[0]
    if not groups or columns % groups:
        raise CheckpointError(f"{scale} has {groups} scales a row, which do not divide {columns} inputs")
    spec = QSpec.parse(f"i{bits}/row/sym" if groups == 1 else f"i{bits}/g{columns // groups}/sym")

    def read(tensor: Read) -> QTensor:
        packed = tensor(data).view(torch.uint8)

        def codes(start: int, stop: int) -> Tensor:
            part = packed[start:stop]
            return part ^ 0x80 if bits == 8 else fields(part, bits)[:, :columns]

        return QTensor.from_rows(spec, (rows, columns), codes, finite(scale, tensor(scale)))

    # An activation scale of 0 was never calibrated.
    sides = [f"{module}.{side}_activation_scale" for side in ("input", "output")]
    known = [name for name in sides if name in checkpoint.tensors]
    roundings = [
        Rounding("i8/tensor/static", name) if name in known and bool(checkpoint.read(name).any()) else None
        for name in sides
    ]
    return Stored(path, spec, (rows, columns), (data, scale, *known), read, *roundings)
