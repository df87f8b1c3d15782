"""Weights that are codes and one tensor of scales: compressed-tensors, fine-grained fp8, fbgemm and Quark.

Scales are floats, or powers of two in a byte each, 2 ** (byte - 127), or, NVFP4, 8-bit floats that one number divides.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._bits import fields
from qcompile.formats.stored import CacheCodes, Entry, Ignored, Read, Rounding, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.granularity import Granularity, PerBlock, PerGroup, PerRow, PerTensor
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

FLOAT8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
POWERS = (torch.uint8, torch.float8_e8m0fnu)

# Outputs of k_proj and v_proj are what a KV cache holds: keys are rounded behind their rope by the same scale.
CACHE_SCALES = (
    ("k_scale", "v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
)
CACHE = re.compile(r"\.[qkv](_cache)?_(scale|zero_point|global_scale)$|\.\w*output_(scale|zero_point)$")

_POWERS = QSpec.parse("e8m0/tensor/sym")
_FLOATS = QSpec.parse("fp8_e4m3/tensor/sym")

# Rows start … stop of a stored weight as uint8 codes.
Codes = Callable[[Tensor, int, int], Tensor]


def cache_scales(checkpoint: Checkpoint, element: str | None) -> Iterator[Entry]:
    """Scales of KV caches, which no weight needs. Says which are not used: without the `element` of the codes, those of
    queries, of keys without values, and zero points that are not zero."""
    names = {name for name in checkpoint.tensors if CACHE.search(name)}
    zeros = {name for name in names if name.endswith("zero_point") and not checkpoint.read(name).any()}
    found: dict[str, tuple[str, str]] = {}
    for of_keys, of_values in CACHE_SCALES if element else ():
        for key in names:
            module = key.removesuffix(f".{of_keys}")
            value = f"{module}.{of_values}"
            points = {name.removesuffix("scale") + "zero_point" for name in (key, value)}
            if module != key and value in names and names.isdisjoint(points - zeros):
                found.setdefault(module, (key, value))
    used = {name for pair in found.values() for name in pair}
    if left := names - used - zeros:
        why = f"has {len(left)} scales of a quantized KV cache, which are not used; kv_cache='fp8_e4m3' makes its own"
        warnings.warn(f"qcompile: {checkpoint.folder} {why}", stacklevel=2)
    for module, pair in sorted(found.items()):
        yield CacheCodes(module, str(element), pair)
    yield Ignored(tuple(sorted(names - used)))


def float8(weight: Tensor, start: int, stop: int) -> Tensor:
    """Codes of 8-bit floats: their bytes."""
    return weight.flatten(0, -2)[start:stop].view(torch.uint8)


def int8(weight: Tensor, start: int, stop: int) -> Tensor:
    """Codes of signed bytes, which start at -128."""
    return weight[start:stop].view(torch.uint8) ^ 0x80


def pairs(weight: Tensor, start: int, stop: int) -> Tensor:
    """Codes of 4 bits, the first of a byte in its low half."""
    return fields(weight.flatten(0, -2)[start:stop].view(torch.uint8), 4)


def scaled(
    checkpoint: Checkpoint,
    path: str,
    weight: str,
    scale: str,
    element: str,
    granularity: Granularity,
    shape: tuple[int, ...],
    codes: Codes,
    divisor: str | None = None,
    also: Sequence[str] = (),
    input: Rounding | None = None,
    output: Rounding | None = None,
) -> Stored:
    """The weight `path` from the tensors `weight` and `scale`; `divisor` names the number that divides its scales.

    `also` are further tensors that belong to it.
    """
    columns = shape[-1]
    groups = granularity.scale_shape(math.prod(shape[:-1]), columns)
    info = checkpoint.need(scale, dtypes=(torch.float8_e4m3fn,) if divisor else (*FLOATS, *POWERS))
    if math.prod(info.shape) != math.prod(groups):
        raise CheckpointError(f"{scale} is {info.shape}; {element} by {granularity} of {shape} needs {groups}")
    if divisor:
        checkpoint.need(divisor, dtypes=torch.float32)
    nested = _FLOATS if divisor else _POWERS if info.dtype in POWERS else None
    spec = QSpec(Element.parse(element), granularity, Zero.NONE, nested)

    def read(tensor: Read) -> QTensor:
        packed, numbers = tensor(weight), tensor(scale).reshape(groups)
        if nested:
            unit = torch.ones(1, 1, device=numbers.device)
            if divisor:
                unit = _reciprocal(divisor, tensor(divisor))
            numbers = QTensor.from_codes(nested, _bytes(scale, numbers), unit, None)
        else:
            finite(scale, numbers)
        return QTensor.from_rows(spec, shape, lambda start, stop: codes(packed, start, stop), numbers)

    tensors = (weight, scale, *([divisor] if divisor else []), *also)
    return Stored(path, spec, shape, tensors, read, input, output)


def shared_by(name: str, shape: tuple[int, ...], rows: int, columns: int, block: object = None) -> Granularity:
    """Who shares a scale of a (rows, columns) weight, told from the shape of its scales.

    `block` is the [height, width] of tiles that the configuration gives, if it does.
    """
    if block is not None:
        height, width = tile = sides(block)
        tiles = PerGroup(width) if height == 1 and columns % width == 0 else PerBlock(height, width)
        if shape == tiles.scale_shape(rows, columns):
            return tiles
    if math.prod(shape) == 1:
        return PerTensor()
    if shape in ((rows,), (rows, 1)):
        return PerRow()
    if len(shape) == 2 and shape[0] == rows and columns >= shape[1] > 0 and columns % shape[1] == 0:
        return PerGroup(columns // shape[1])
    known = f"blocks of {tile[0]}x{tile[1]}" if block is not None else "blocks, of which the configuration says nothing"
    raise CheckpointError(
        f"{name} is {shape}, which for a weight of ({rows}, {columns}) is neither one scale, nor one a row, "
        f"nor one a group of inputs, nor {known}"
    )


def sides(block: object) -> tuple[int, int]:
    """Height and width of blocks as configurations give them: [128, 128] or "128x128"."""
    found = block.split("x") if isinstance(block, str) else block
    if isinstance(found, list | tuple) and len(found) == 2 and all(str(side).isdecimal() for side in found):
        height, width = (int(side) for side in found)
        if height and width:
            return height, width
    raise CheckpointError(f"a block is {str(block)[:80]!r}, not the height and the width of tiles")


def _bytes(name: str, scale: Tensor) -> Tensor:
    # The one code of e8m0 that is no number is 255.
    if scale.dtype in POWERS:
        codes = scale.contiguous().view(torch.uint8)
        finite(name, codes.view(torch.float8_e8m0fnu))
        return codes
    return finite(name, scale).contiguous().view(torch.uint8)


def _reciprocal(name: str, number: Tensor) -> Tensor:
    """In float64, so that a product with an 8-bit float, rounded to float32, is the quotient rounded to float32."""
    if number.numel() != 1 or not 0 < abs(number.item()) < math.inf:
        raise CheckpointError(f"{name} is {number.flatten()[:4].tolist()}, not one number to divide by")
    return 1 / number.reshape(1, 1).to(torch.float64)
