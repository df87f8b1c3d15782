"""AQLM: tiles that are sums of entries of several codebooks.

    codes       int8, int16 or int32 (out/og, in/ig, K), c or c - 2^bits
    codebooks   float (K, 2^bits, og, ig)
    scales      float (out/og, 1, 1, 1)

https://github.com/Vahe1994/AQLM (inference_lib/src/aqlm)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Read, Stored, finite
from qcompile.quant.codebook import CodebookTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Aqlm:
    name = "aqlm"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == "aqlm" or bool(checkpoint.modules("codebooks"))

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        for module in checkpoint.modules("codebooks"):
            yield _stored(checkpoint, module)


def _stored(checkpoint: Checkpoint, module: str) -> Stored:
    names = codes, codebooks, scales = tuple(f"{module}.{kind}" for kind in ("codes", "codebooks", "scales"))
    stages, entries, height, width = checkpoint.need(codebooks, 4, FLOATS).shape
    down, across, count = checkpoint.need(codes, 3, (torch.int8, torch.int16, torch.int32)).shape
    if count != stages:
        raise CheckpointError(f"{codes} names entries of {count} codebooks; {codebooks} holds {stages}")
    if not math.log2(max(entries, 1)).is_integer() or entries < 2:
        raise CheckpointError(f"{codebooks} has {entries} entries, which is no power of two")
    if math.prod(checkpoint.need(scales, dtypes=FLOATS).shape) != down:
        raise CheckpointError(f"{scales} is {checkpoint.need(scales).shape}; {down} rows of tiles have a scale each")
    shape = (down * height, across * width)

    def read(tensor: Read) -> CodebookTensor:
        numbers = _unsigned(codes, tensor(codes), entries)
        books = finite(codebooks, tensor(codebooks))
        return CodebookTensor(
            shape,
            tuple(numbers[:, :, stage].contiguous() for stage in range(stages)),
            tuple(books[stage : stage + 1] for stage in range(stages)),
            scale=finite(scales, tensor(scales)).reshape(down, 1),
        )

    spec = f"codebook/{height}x{width}/{'+'.join([str(entries)] * stages)}"
    return Stored(f"{module}.weight", spec, shape, names, read)


def _unsigned(name: str, codes: Tensor, entries: int) -> Tensor:
    """The numbers of entries, in the dtypes of CodebookTensor."""
    if codes.numel() and not -entries // 2 <= int(codes.min()) <= int(codes.max()) < entries:
        raise CheckpointError(f"{name} holds {int(codes.min())} … {int(codes.max())}; codebooks have {entries} entries")
    if codes.dtype == torch.int8:
        return codes.view(torch.uint8) & (entries - 1)
    return codes if entries == 1 << 16 and codes.dtype == torch.int16 else codes & (entries - 1)
