"""optimum-quanto: tensors of subclasses by their attributes, and quanto_qmap.json with the types of each module.

    8 bits    P.weight._data        int8 or float8 (out, in), P.weight._scale (out, 1)
    4, 2 bits P.weight._data._data  uint8: a matrix of codes, one row for each scale, cut into 2 or 4 blocks of
                                    rows, the first block in the lowest bits
              P.weight._scale, P.weight._shift (scales, 1): scale * code - shift, or (code - shift) * scale where
                                    shift is an integer
    always    P.input_scale, P.output_scale: static scales of activations, 1 where there are none

A row of codes is a row of the weight or a group of it; the shape of the weight is not stored and is the model's.
https://github.com/huggingface/optimum-quanto (tensor/packed.py, tensor/grouped.py, nn/qmodule.py)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Entry, Ignored, Read, Rounding, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup, PerRow
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

QMAP = "quanto_qmap.json"
BYTES = {torch.int8: "i8", torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
ACTIVATIONS = {"qint8": "i8", "qfloat8": "fp8_e4m3", "qfloat8_e4m3fn": "fp8_e4m3", "qfloat8_e5m2": "fp8_e5m2"}
SCALES = (torch.float32, torch.float16, torch.bfloat16)


class Quanto:
    name = "quanto"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name or bool(
            checkpoint.modules("weight._data") or checkpoint.modules("weight._data._data")
        )

    def weights(self, checkpoint: Checkpoint) -> Iterator[Entry]:
        types = checkpoint.json(QMAP) or {}
        found = dict.fromkeys(checkpoint.modules("weight._data"), _bytes)
        found |= dict.fromkeys(checkpoint.modules("weight._data._data"), _bits)
        if not found:
            raise CheckpointError(
                "config.json says quanto, and no weight is quantized: this configuration asks to quantize at load; "
                "remove quantization_config and quantize with qcompile.optimize"
            )
        for module, reader in found.items():
            yield reader(checkpoint, module, types)
        for module in set(checkpoint.modules("output_scale")) - set(found):
            if _activations(types, module):
                warnings.warn(f"qcompile: the output of {module}, whose weight is float, is not rounded", stacklevel=2)
            yield Ignored(_scales(checkpoint, module))


def _bytes(checkpoint: Checkpoint, module: str, types: dict[str, Any]) -> Stored:
    data, scale = f"{module}.weight._data", f"{module}.weight._scale"
    info = checkpoint.need(data, 2, tuple(BYTES))
    rows = info.shape[0]
    checkpoint.need(scale, (rows, 1), SCALES)
    spec = QSpec(Element.parse(BYTES[info.dtype]), PerRow(), Zero.NONE)

    def read(tensor: Read) -> QTensor:
        packed, offset = tensor(data).view(torch.uint8), spec.offset
        return QTensor.from_rows(
            spec, info.shape, lambda start, stop: packed[start:stop] ^ offset, finite(scale, tensor(scale))
        )

    return _stored(checkpoint, module, types, spec, info.shape, read)


def _bits(checkpoint: Checkpoint, module: str, types: dict[str, Any]) -> Stored:
    data, scale, shift = (f"{module}.weight.{name}" for name in ("_data._data", "_scale", "_shift"))
    block, width = checkpoint.need(data, 2, torch.uint8).shape
    scales = checkpoint.need(scale, 2, SCALES).shape[0]
    checkpoint.need(scale, (scales, 1))
    kind = checkpoint.need(shift, (scales, 1), (*SCALES, torch.int8, torch.uint8)).dtype
    bits = _width(data, block, scales, _said(types, module, "weights"))
    shape = checkpoint.shapes.get(f"{module}.weight", (scales, width))
    if not width or math.prod(shape) != scales * width or shape[-1] % width:
        raise CheckpointError(
            f"{data} has {scales} groups of {width} codes, the model's {module}.weight is {shape}. "
            "Does config.json belong to these files?"
        )
    runs = shape[-1] // width  # rows of codes in a row of the weight
    granularity = PerRow() if runs == 1 else PerGroup(width)
    spec = QSpec(Element.parse(f"u{bits}"), granularity, Zero.SHIFT if kind.is_floating_point else Zero.INT)

    def read(tensor: Read) -> QTensor:
        packed, given = tensor(data), tensor(shift)

        def codes(start: int, stop: int) -> Tensor:
            first, last = start * runs, stop * runs
            parts = [
                packed[max(first - place * block, 0) : max(last - place * block, 0)] >> bits * place
                for place in range(8 // bits)
            ]
            return (torch.cat(parts) & (2**bits - 1)).reshape(-1, shape[-1])

        if kind.is_floating_point:
            zero = -finite(shift, given)
        elif given.min() < 0:
            raise CheckpointError(f"{shift} holds negative zero points; codes start at 0")
        else:
            zero = given.to(torch.uint8)
        numbers = (side.reshape(-1, runs) for side in (finite(scale, tensor(scale)), zero))
        return QTensor.from_rows(spec, shape, codes, *numbers)

    return _stored(checkpoint, module, types, spec, shape, read)


def _width(data: str, block: int, scales: int, said: str) -> int:
    """2 or 4 bits, by the number of packed rows; quanto's map decides where very few rows fit both."""
    fitting = [bits for bits in (4, 2) if block == -(-scales * bits // 8)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting and said in ("qint4", "qint2"):
        return int(said[-1])
    raise CheckpointError(
        f"{data} has {block} rows; {scales} rows of codes in 4 or 2 bits ({said}) have another number"
    )


def _stored(
    checkpoint: Checkpoint, module: str, types: dict[str, Any], spec: QSpec, shape: tuple[int, ...], read: Any
) -> Stored:
    tensors = tuple(name for name in checkpoint.tensors if name.startswith(f"{module}.weight._"))
    roundings = [None, None]
    if element := _activations(types, module):
        names = [f"{module}.{side}_scale" for side in ("input", "output")]
        for name in names:
            checkpoint.need(name, dtypes=SCALES)
        roundings = [Rounding(f"{element}/tensor/static/native", name) for name in names]
    return Stored(f"{module}.weight", spec, shape, (*tensors, *_scales(checkpoint, module)), read, *roundings)


def _activations(types: dict[str, Any], module: str) -> str | None:
    said = _said(types, module, "activations")
    if said not in ("none", *ACTIVATIONS):
        raise CheckpointError(f"{QMAP}: {module} has activations {said!r}; known: none, {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS.get(said)


def _said(types: dict[str, Any], module: str, side: str) -> str:
    entry = types.get(module, {})
    if not isinstance(entry, dict):
        raise CheckpointError(f"{QMAP}: {module} is {str(entry)[:80]}, not its types of weights and activations")
    return str(entry.get(side) or "none")


def _scales(checkpoint: Checkpoint, module: str) -> tuple[str, ...]:
    names = (f"{module}.input_scale", f"{module}.output_scale")
    return tuple(name for name in names if name in checkpoint.tensors)
