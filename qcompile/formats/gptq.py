"""GPTQ: integer codes packed along the inputs, as AutoGPTQ, GPTQModel, optimum and auto-round write them.

    qweight  int32 (in * bits/32, out), low bits first; 3 bits as a continuous stream
    qzeros   int32 (groups, out * bits/32), packed along the outputs
    scales   (groups, out)
    g_idx    int32 (in), the group of each input; without it input i has group i // group_size

GPTQModel's format gptq_p, and all of 5, 6 and 7 bits, cut codes into planes of 4, 2 and 1 bits: 32 codes are as many
words as they have bits, low planes first. Formats gptq_v2 and gptq_p store the zero point itself, gptq stores it less
one.

https://github.com/AutoGPTQ/AutoGPTQ (nn_modules/qlinear), https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats import _qweight
from qcompile.formats._bits import fields, stream
from qcompile.formats.stored import Read, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.packing import PLANES
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor


class Gptq:
    name = "gptq"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return _qweight.method(checkpoint) == "gptq"

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        config, packed = checkpoint.quantization, False
        for module in checkpoint.modules("qweight"):
            if found := _qweight.layout(checkpoint, module):
                if found != "gptq":
                    raise CheckpointError(f"{module} has AWQ's layout, others have GPTQ's")
                packed = True
                yield _weight(checkpoint, module, config)
        if not packed:
            raise _qweight.none_packed(checkpoint, self.name)


def _weight(checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> Stored:
    qweight, qzeros, scales, g_idx = (f"{module}.{kind}" for kind in ("qweight", "qzeros", "scales", "g_idx"))
    words, rows = checkpoint.need(qweight, 2, torch.int32).shape
    groups = checkpoint.need(scales, 2, _qweight.SCALES).shape[0]
    bits = _bits(checkpoint, module, config)
    columns = words * 32 // bits
    planes = bits in (5, 6, 7) or _format(config) == "gptq_p"

    index = _groups(checkpoint, module, columns, groups, config)
    order = None if bool((index[1:] >= index[:-1]).all()) else torch.argsort(index, stable=True)
    # Groups of unequal size become groups of their common divisor, which repeat a scale.
    size = math.gcd(*index.bincount().tolist())
    which = (index if order is None else index[order])[::size]

    symmetric = _is_symmetric(_unpack(checkpoint.read(qzeros), bits, rows, planes), bits, config)
    element = Element.parse(f"{'i' if symmetric else 'u'}{bits}")
    spec = QSpec(element, _qweight.groups_of(size, columns), Zero.NONE if symmetric else Zero.INT)

    def read(tensor: Read) -> QTensor:
        packed = tensor(qweight)
        places = None if order is None else order.to(packed.device)
        chosen = which.to(packed.device)

        def codes(start: int, stop: int) -> Tensor:
            found = _unpack(packed[:, start:stop].t(), bits, columns, planes)
            return found if places is None else found.index_select(1, places)

        scale = finite(scales, tensor(scales)).t()[:, chosen].contiguous()
        zero = None
        if not symmetric:
            zero = _zeros(tensor(qzeros), bits, rows, planes, config).t()[:, chosen].contiguous()
        return QTensor.from_rows(spec, (rows, columns), codes, scale, zero, places)

    tensors = tuple(name for name in (qweight, qzeros, scales, g_idx) if name in checkpoint.tensors)
    return Stored(f"{module}.weight", spec, (rows, columns), tensors, read)


def _bits(checkpoint: Checkpoint, module: str, config: dict[str, Any]) -> int:
    """From the shapes: `dynamic` rules give modules bits of their own."""
    words, rows = checkpoint.tensors[f"{module}.qweight"].shape
    groups = checkpoint.tensors[f"{module}.scales"].shape[0]
    zeros = checkpoint.need(f"{module}.qzeros", 2, torch.int32).shape
    inputs = checkpoint.need(f"{module}.g_idx", 1).shape[0] if f"{module}.g_idx" in checkpoint.tensors else None
    fitting = [
        bits
        for bits in (2, 3, 4, 5, 6, 7, 8)
        if zeros == (groups, -(-rows * bits // 32)) and words * 32 % bits == 0 and inputs in (None, words * 32 // bits)
    ]
    fitting = [bits for bits in fitting if bits == config.get("bits")] or fitting
    if len(fitting) != 1 or not words or not rows or not groups:
        raise CheckpointError(
            f"{module}: qweight {(words, rows)}, qzeros {zeros}, {groups} groups of scales, g_idx of {inputs} inputs "
            "fit no number of bits from 2 to 8 that packs outputs and inputs into words of 32"
        )
    return fitting[0]


def _groups(checkpoint: Checkpoint, module: str, columns: int, groups: int, config: dict[str, Any]) -> Tensor:
    """The group of each input, int64."""
    name = f"{module}.g_idx"
    if name in checkpoint.tensors:
        checkpoint.need(name, (columns,), (torch.int32, torch.int64))
        index = checkpoint.read(name).long()
        index = torch.where(index < 0, index + groups, index)  # counted from the end
        if bool(((index < 0) | (index >= groups)).any()):
            raise CheckpointError(f"{name} has values beyond the {groups} groups of {module}.scales")
        return index
    if config.get("desc_act") is True and groups > 1:
        checkpoint.need(name)
    size = _qweight.group_size(config, module)
    size = columns if size == -1 else size
    if size is None or -(-columns // size) != groups:
        if columns % groups:
            raise CheckpointError(
                f"{module}: {groups} groups of scales do not divide {columns} inputs, group_size is {size} by the "
                "configuration, and there is no g_idx"
            )
        size = columns // groups
    return torch.arange(columns) // size


def _unpack(words: Tensor, bits: int, count: int, planes: bool) -> Tensor:
    """`count` codes along the last dimension."""
    if planes and bits in (3, 5, 6, 7):
        blocks, low = words.unflatten(-1, (-1, bits)), 0
        codes = torch.zeros((*blocks.shape[:-1], 32), dtype=torch.uint8, device=words.device)
        for width in PLANES[bits]:
            # A plane of 32 codes of `width` bits is `width` words.
            codes |= fields(blocks[..., low : low + width], width) << low
            low += width
        return codes.flatten(-2)[..., :count]
    return (stream(words, bits, count) if bits == 3 else fields(words, bits))[..., :count]


def _format(config: dict[str, Any]) -> str:
    return str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()


def _is_symmetric(stored: Tensor, bits: int, config: dict[str, Any]) -> bool:
    """Whether every zero point is the middle of the codes. Files say gptq and hold gptq_v2's zero points, and the other
    way round: of a symmetric model either means the middle."""
    middle = 2 ** (bits - 1)
    return config.get("sym") is not False and bool((stored == middle).all() or (stored == middle - 1).all())


def _zeros(words: Tensor, bits: int, rows: int, planes: bool, config: dict[str, Any]) -> Tensor:
    """Zero points, (groups, rows) uint8."""
    packing = str(config.get("packing_format") or config.get("backend") or "")
    # auto-round's own packing takes nothing off, its auto_round:auto_gptq does.
    as_is = _format(config) in ("gptq_v2", "gptq_p") or ("auto_round" in packing and "gptq" not in packing)
    if as_is:
        return _unpack(words, bits, rows, planes)
    meta = config.get("meta")
    by_gptqmodel = isinstance(meta, dict) and "gptqmodel" in str(meta.get("quantizer"))
    if by_gptqmodel and bits in (2, 4, 8):
        # It takes the one off whole words, so that a zero point of 0 borrows from the next one; adding it back to the
        # word, past its end, undoes that.
        ones = sum(1 << shift for shift in range(0, 32, bits))
        return _unpack(words + ones, bits, rows, planes)
    # AutoGPTQ takes it off each one and adds it to each one, at 3 bits without wrapping round.
    zeros = _unpack(words, bits, rows, planes) + 1
    return zeros if bits == 3 and not by_gptqmodel else zeros & (2**bits - 1)
