"""HQQ: codes with float zero points, grouped over the flat weight without regard to its rows.

    W_q      the codes of a matrix, uint8 or int32: the weight as (n/g, g) with a scale a row, `axis` 1, or as (g, n/g)
             with a scale a column, `axis` 0. Its rows are cut into as many blocks as a word holds codes; a word holds
             one of each block, the first block in its highest bits
    scale, zero            one a group; or, in old files, quantized in the same way: scale_q with meta_scale, zero_q
             with meta_zero, or both of them stacked in zero_scale
    shape, group_size, axis, nbits, packing, …    as tensors in safetensors files, as values in qmodel.pt, which
             older ones keep in `meta`

https://github.com/mobiusml/hqq (hqq/core/quantize.py, bitpack.py)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats.stored import Read, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup, PerOutputGroup, PerRow, PerTensor
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# Bits of a code and dtype of a word, by the name of the packing.
PACKINGS: dict[str, tuple[int, torch.dtype]] = {
    "8bit_u8": (8, torch.uint8),
    "4bit_u8": (4, torch.uint8),
    "3bit_32": (3, torch.int32),
    "2bit_u8": (2, torch.uint8),
    "1bit_u8": (1, torch.uint8),
}
USUAL = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
    1: "1bit_u8",
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# What the transformers form keeps of a module besides W_q, scale, zero and bias.
DESCRIBES = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "compute_dtype"),
    *("quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero", "offload_meta", "encoded_state_dict"),
    "stores_quant_config",
)


class Hqq:
    name = "hqq"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return bool(checkpoint.modules("W_q")) or checkpoint.quantization.get("quant_method") == "hqq"

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        modules = checkpoint.modules("W_q")
        if not modules:
            raise CheckpointError(f"{checkpoint.folder.name} is quantized by hqq by its configuration, and has no W_q")
        for module in modules:
            yield _weight(checkpoint, module)


def _weight(checkpoint: Checkpoint, module: str) -> Stored:
    # Old files keep everything but the codes in `meta`.
    about = f"{module}.meta" if f"{module}.meta.nbits" in checkpoint.metadata else module
    shape = _shape(checkpoint, about)
    matrix = _quantized(checkpoint, f"{module}.W_q", None, about, shape)
    assert matrix.spec is not None
    described = [name for key in DESCRIBES if (name := f"{about}.{key}") in checkpoint.tensors]
    tensors = tuple(dict.fromkeys((*matrix.tensors, *described)))
    return Stored(f"{module}.weight", matrix.spec, shape, tensors, matrix.read)


@dataclass(frozen=True)
class Numbers:
    """A matrix of numbers: the tensors that it is made of, its spec if it is quantized, and what makes it."""

    tensors: tuple[str, ...]
    spec: QSpec | None
    read: Callable[[Read], Any]


def _quantized(checkpoint: Checkpoint, name: str, at: int | None, about: str, shape: tuple[int, int]) -> Numbers:
    """The matrix whose codes are the tensor `name`, or what it has at an index, described by the values at `about`."""
    bits, axis = _value(checkpoint, f"{about}.nbits"), _value(checkpoint, f"{about}.axis")
    packing, size = _value(checkpoint, f"{about}.packing"), _value(checkpoint, f"{about}.group_size")
    own, numel = _shape(checkpoint, about), math.prod(shape)
    packing = USUAL.get(bits, "") if packing is None and isinstance(bits, int | float) else packing
    known = type(axis) is int and axis in (0, 1) and isinstance(bits, int | float) and bits in USUAL
    if not known or not isinstance(packing, str) or packing not in PACKINGS or PACKINGS[packing][0] < bits:
        raise CheckpointError(f"{about}: nbits {bits}, packing {packing}, axis {axis} are not HQQ's")
    size = own[axis] if size is None else size
    if type(size) is not int or size < 1 or numel % size or math.prod(own) != numel:
        raise CheckpointError(f"{about}: shape {own} in groups of {size} does not give a weight of {shape}")
    width, word = PACKINGS[packing]
    height = size if axis == 0 else numel // size
    one = f"{about}.scale" in checkpoint.tensors and math.prod(checkpoint.tensors[f"{about}.scale"].shape) == 1
    granularity = PerTensor() if one else PerOutputGroup(size) if axis == 0 else PerGroup(size)
    granularity = PerRow() if granularity == PerGroup(shape[1]) else granularity

    info = checkpoint.need(name)
    count = word.itemsize * 8 // width  # codes of a word
    block = -(-height // count) * (numel // height)
    stored = math.prod(info.shape if at is None else info.shape[1:]) * info.dtype.itemsize
    if info.dtype not in (word, *FLOATS) or stored != block * word.itemsize:
        raise CheckpointError(
            f"{name} is {info.dtype} of {info.shape}; a weight of {shape} as {packing} in groups of {size} along axis "
            f"{axis} is {block} words of {word}"
        )
    groups = granularity.scale_shape(*shape)
    scale, zero = (_side(checkpoint, about, kind, groups) for kind in ("scale", "zero"))
    element = Element.parse(f"u{math.ceil(bits)}")
    spec = QSpec(element, granularity, Zero.FLOAT, scale.spec, zero.spec)

    def read(tensor: Read) -> QTensor:
        packed = tensor(name)
        # Files may have the words under the dtype of a float, with the same bytes.
        words = (packed if at is None else packed[at]).flatten().view(word)

        def codes(start: int, stop: int) -> Tensor:
            first, last = start * shape[1], stop * shape[1]
            pieces = []
            for part in range(count):
                low, high = (min(max(bound - part * block, 0), block) for bound in (first, last))
                pieces.append((words[low:high] >> width * (count - 1 - part) & (2**width - 1)).to(torch.uint8))
            found = torch.cat(pieces)
            if element.bits < width and bool((found >= element.levels).any()):
                raise CheckpointError(f"{name} has codes beyond {bits} bits")
            return found.reshape(stop - start, shape[1])

        return QTensor.from_rows(spec, shape, codes, scale.read(tensor), zero.read(tensor))

    return Numbers((name, *scale.tensors, *zero.tensors), spec, read)


def _side(checkpoint: Checkpoint, about: str, kind: str, groups: tuple[int, int]) -> Numbers:
    """The scales or the zero points: floats, or codes again."""
    plain, codes, both = f"{about}.{kind}", f"{about}.{kind}_q", f"{about}.zero_scale"
    if codes in checkpoint.tensors:
        return _quantized(checkpoint, codes, None, f"{about}.meta_{kind}", groups)
    name, at = (plain, None) if plain in checkpoint.tensors else (both, ("zero", "scale").index(kind))
    if name not in checkpoint.tensors:
        raise CheckpointError(f"{plain} is missing")
    info = checkpoint.need(name)
    if at is not None and info.shape[:1] != (2,):
        raise CheckpointError(f"{name} is {info.shape}, not zero points and scales")
    if at is not None and info.dtype == torch.uint8:
        return _quantized(checkpoint, name, at, f"{about}.meta_{kind}", groups)
    shape = info.shape if at is None else info.shape[1:]
    if math.prod(shape) != math.prod(groups) or info.dtype not in FLOATS:
        raise CheckpointError(f"{name} is {info.dtype} of {info.shape}; these groups need {groups} floats")

    def read(tensor: Read) -> Tensor:
        numbers = tensor(name)
        return finite(name, numbers if at is None else numbers[at]).reshape(groups).contiguous()

    return Numbers((name,), None, read)


def _shape(checkpoint: Checkpoint, about: str) -> tuple[int, int]:
    shape = _value(checkpoint, f"{about}.shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise CheckpointError(f"{about}.shape is {shape}, not two counts")
    return shape[0], shape[1]


def _value(checkpoint: Checkpoint, name: str) -> Any:
    """A number, a text or a list of numbers, from a pickle's values or from a tensor that holds it; None without it."""
    if text := checkpoint.metadata.get(name):
        try:
            return json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{name} is {text[:80]!r}, not JSON") from error
    if name not in checkpoint.tensors:
        return None
    if math.prod(checkpoint.need(name).shape) > 100:
        raise CheckpointError(f"{name} is {checkpoint.need(name).shape}; it describes a weight by a few numbers")
    value = checkpoint.read(name)
    if value.dim() == 1 and value.dtype == torch.uint8:
        return bytes(value.tolist()).decode("ascii", "replace")
    # 1.58 bits are a float32.
    return round(value.item(), 6) if value.dim() == 0 else value.tolist()
