"""MXFP4: the experts of gpt-oss as 4-bit floats, 32 inputs by a power of two.

    P_blocks    uint8 (experts, out, in/32, 16), the first code of a byte in its low half
    P_scales    uint8 (experts, out, in/32), 2 ** (byte - 127)

P is a parameter of a layer's experts, gate_up_proj or down_proj, which the model holds as (experts, in, out). Rows of
gate and up alternate, as the model reads them.

https://huggingface.co/openai/gpt-oss-20b, https://github.com/openai/gpt-oss (torch/weights.py)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._bits import fields
from qcompile.formats._scaled import scaled
from qcompile.formats.stored import Stored
from qcompile.quant.granularity import PerGroup

BLOCK = 32


class Mxfp4:
    name = "mxfp4"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return any(_names(checkpoint))

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        for path in _names(checkpoint):
            blocks, scales = f"{path}_blocks", f"{path}_scales"
            experts, rows, groups, size = checkpoint.need(blocks, 4, torch.uint8).shape
            if 2 * size != BLOCK:
                raise CheckpointError(f"{blocks} has blocks of {size} bytes; {BLOCK} codes of 4 bits have {BLOCK // 2}")
            checkpoint.need(scales, (experts, rows, groups), torch.uint8)
            shape = (experts, rows, BLOCK * groups)
            yield scaled(checkpoint, path, blocks, scales, "fp4_e2m1", PerGroup(BLOCK), shape, _codes)


def _names(checkpoint: Checkpoint) -> Iterator[str]:
    """The parameters that are stored as blocks and scales."""
    for name in checkpoint.tensors:
        path = name.removesuffix("_blocks")
        if path != name and f"{path}_scales" in checkpoint.tensors:
            yield path


def _codes(blocks: Tensor, start: int, stop: int) -> Tensor:
    return fields(blocks.flatten(0, 1)[start:stop].flatten(1), 4)
