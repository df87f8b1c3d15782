"""torchao: tensor subclasses flattened into plain tensors; the file's header says what each weight is.

    header  "P.weight" -> JSON {"_type": class, "_data": {block_size, activation rule, …}, "_tensor_data_names": […]}
    P._weight_<name>   the tensors of P.weight

    Int8Tensor                qdata int8 (out, in), scale, zero_point int8 by blocks: (q - zero) * scale
    IntxUnpackedToInt8Tensor  the same with target_dtype int1 … int8, also with a float zero_point
    Float8Tensor              qdata float8, scale by blocks
    Int4Tensor                qdata int8 (out, in/2), low half first, signed; scale, zero_point (in/g, out):
                              q * scale + zero_point
    Int4TilePackedTo4dTensor  qdata int32 (out/8, in/128, 32, 4), padded, in the order of the tinygemm kernel;
                              scale_and_zero (in/g, out, 2): (u - 8) * scale + zero

https://github.com/pytorch/ao (torchao/prototype/safetensors, torchao/quantization/quantize_/workflows)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats import _torchao_rounding as rounding
from qcompile.formats._bits import fields
from qcompile.formats._torchao_weight import Weight, weights_in
from qcompile.formats.stored import Read, Rounding, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.granularity import Granularity, PerBlock, PerGroup, PerRow, PerTensor
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

SCALES = (torch.float32, torch.float16, torch.bfloat16)
# Offsets in a run of 32 inputs that the eight fields of a tinygemm word hold; two more a lane.
TILE = (0, 8, 16, 24, 1, 9, 17, 25)


class TorchAO:
    name = "torchao"

    def claims(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.quantization.get("quant_method") == self.name or any(weights_in(checkpoint))

    def weights(self, checkpoint: Checkpoint) -> Iterator[Stored]:
        found = list(weights_in(checkpoint))
        for weight in found:
            if weight.kind not in READERS:
                raise CheckpointError(
                    f"{weight.path} is a torchao {weight.kind}, which is not read here (known: {', '.join(READERS)}); "
                    "quantize the float original with qcompile.optimize, or save it again with a current torchao"
                )
            yield READERS[weight.kind](weight)
        if not found:
            said = checkpoint.quantization.get("quant_type")
            raise CheckpointError(
                f"config.json says torchao, {str(said)[:80]}, and no tensor is quantized: this configuration asks to "
                "quantize at load; remove quantization_config and quantize with qcompile.optimize"
            )


def _granularity(weight: Weight, shape: tuple[int, ...]) -> Granularity:
    block = weight.counts("block_size") if weight.data.get("block_size") else shape
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if block == shape:
        return PerTensor() if rows > 1 else PerRow()
    if len(block) == len(shape) and all(n == 1 for n in block[:-1]) and columns % block[-1] == 0:
        return PerRow() if block[-1] == columns else PerGroup(block[-1])
    if len(block) == len(shape) == 2 and not any(n % b for n, b in zip(shape, block, strict=True)):
        return PerBlock(*block)
    raise CheckpointError(f"{weight.path}: blocks of {block} do not divide {shape}")


def _int8(weight: Weight) -> Stored:
    return _integers(weight, 8, rounding.of_int8(weight))


def _intx(weight: Weight) -> Stored:
    said = weight.attribute("target_dtype")
    if str(said) not in {f"int{bits}" for bits in range(1, 9)}:
        raise CheckpointError(f"{weight.path}: target_dtype is {said!r}, not int1 … int8")
    return _integers(weight, int(said[3:]), rounding.of_intx(weight))


def _integers(weight: Weight, bits: int, inputs: Rounding | None) -> Stored:
    checkpoint, qdata, scale, zero = weight.checkpoint, *(weight.name(n) for n in ("qdata", "scale", "zero_point"))
    shape, half = checkpoint.need(qdata, dtypes=torch.int8).shape, 2 ** (bits - 1)
    granularity = _granularity(weight, shape)
    groups = granularity.scale_shape(math.prod(shape[:-1]), shape[-1])
    _need_numbers(checkpoint, scale, groups, SCALES)
    kind = Zero.NONE
    if weight.has("zero_point"):
        info = _need_numbers(checkpoint, zero, groups, (torch.int8, *SCALES))
        if bool(checkpoint.read(zero).any()):
            kind = Zero.FLOAT if info.is_floating_point else Zero.INT
    if bits == 1 and kind is Zero.NONE:  # codes -1 and 0: no centred element
        kind = Zero.INT
    spec = QSpec(Element.parse(f"{'i' if kind is Zero.NONE else 'u'}{bits}"), granularity, kind)

    def read(tensor: Read) -> QTensor:
        flat = tensor(qdata).reshape(-1, shape[-1])

        def codes(start: int, stop: int) -> Tensor:
            part = flat[start:stop].to(torch.int16) + half
            if part.min() < 0 or part.max() >= 2 * half:
                raise CheckpointError(f"{qdata} holds codes outside {-half} … {half - 1}, as int{bits} has them")
            return part.to(torch.uint8)

        shift = None
        if kind is Zero.FLOAT:
            shift = finite(zero, tensor(zero)).reshape(groups).float() + half
        elif kind is Zero.INT:
            given = (
                tensor(zero).reshape(groups) if weight.has("zero_point") else torch.zeros(groups, device=flat.device)
            )
            shift = given.to(torch.int16) + half
            if shift.min() < 0:
                raise CheckpointError(f"{zero} holds zero points below {-half}, the least of int{bits}")
            shift = shift.to(torch.uint8)
        return QTensor.from_rows(spec, shape, codes, finite(scale, tensor(scale)).reshape(groups), shift)

    return weight.stored(spec, shape, read, inputs)


def _float8(weight: Weight) -> Stored:
    checkpoint, qdata, scale = weight.checkpoint, weight.name("qdata"), weight.name("scale")
    info = checkpoint.need(qdata, dtypes=tuple(rounding.FLOAT8))
    shape = info.shape
    granularity = _granularity(weight, shape)
    groups = granularity.scale_shape(math.prod(shape[:-1]), shape[-1])
    _need_numbers(checkpoint, scale, groups, SCALES)
    spec = QSpec(Element.parse(rounding.FLOAT8[info.dtype]), granularity, Zero.NONE)

    def read(tensor: Read) -> QTensor:
        flat = tensor(qdata).view(torch.uint8).reshape(-1, shape[-1])
        numbers = finite(scale, tensor(scale)).reshape(groups)
        return QTensor.from_rows(spec, shape, lambda start, stop: flat[start:stop], numbers)

    return weight.stored(spec, shape, read, rounding.of_float8(weight))


def _int4(weight: Weight) -> Stored:
    checkpoint, qdata, scale, zero = weight.checkpoint, *(weight.name(n) for n in ("qdata", "scale", "zero_point"))
    shape, size = weight.counts("shape"), weight.counts("block_size")[-1]
    if len(shape) < 2 or shape[-1] % size or shape[-1] % 2:
        raise CheckpointError(f"{weight.path}: groups of {size} in pairs of inputs do not divide {shape}")
    checkpoint.need(qdata, (*shape[:-1], shape[-1] // 2), torch.int8)
    groups = (*shape[:-2], shape[-1] // size, shape[-2])
    for name in (scale, zero):
        checkpoint.need(name, groups, SCALES)
    symmetric = not bool(checkpoint.read(zero).any())
    spec = QSpec.parse(f"i4/g{size}/sym" if symmetric else f"u4/g{size}/shift")

    def read(tensor: Read) -> QTensor:
        flat = tensor(qdata).reshape(-1, shape[-1] // 2)

        def rows(name: str) -> Tensor:
            return finite(name, tensor(name)).transpose(-1, -2).reshape(-1, shape[-1] // size)

        step = rows(scale)
        shift = None if symmetric else _shift(step, rows(zero))
        return QTensor.from_rows(spec, shape, lambda start, stop: fields(flat[start:stop], 4) ^ 8, step, shift)

    return weight.stored(spec, shape, read, rounding.of_int4(weight))


def _tiles(weight: Weight) -> Stored:
    checkpoint, qdata, pairs = weight.checkpoint, weight.name("qdata"), weight.name("scale_and_zero")
    shape, size = weight.counts("shape"), weight.counts("block_size")[-1]
    tiles = checkpoint.need(qdata, 4, torch.int32).shape
    rows, columns = 8 * tiles[0], 128 * tiles[1]
    if tiles[2:] != (32, 4) or len(shape) != 2 or shape[0] > rows or shape[1] > columns or columns % size:
        raise CheckpointError(f"{qdata} is {tiles}; {shape} in groups of {size} needs (out/8, in/128, 32, 4)")
    checkpoint.need(pairs, (columns // size, rows, 2), SCALES)
    # A group that the padding shares is cut at the end of the row.
    group = math.gcd(size, shape[1])
    spec = QSpec.parse(f"u4/g{group}/shift")

    def read(tensor: Read) -> QTensor:
        packed = tensor(qdata)
        lanes = torch.arange(4).reshape(4, 1) * 2 + torch.tensor(TILE)  # inputs of lane and field
        places = torch.argsort(lanes.reshape(-1)).to(packed.device)

        def codes(start: int, stop: int) -> Tensor:
            words = packed[start // 8 : -(-stop // 8)].unflatten(2, (8, 4))  # tile, 128 inputs, row, lane, 32 inputs
            runs = fields(words[..., None], 4).permute(0, 2, 1, 4, 3, 5).flatten(-2)[..., places]
            return runs.reshape(-1, columns)[start % 8 : start % 8 + stop - start, : shape[1]]

        numbers = finite(pairs, tensor(pairs))[:, : shape[0]].permute(2, 1, 0)
        step, zero = numbers.repeat_interleave(size // group, dim=2)[..., : shape[1] // group].contiguous()
        return QTensor.from_rows(spec, shape, codes, step, _shift(step, zero))

    return weight.stored(spec, shape, read, None)


def _shift(step: Tensor, zero: Tensor) -> Tensor:
    """The value of code 0, where code 8 has the value `zero`. float32 holds it exactly unless 16-bit steps and zeros
    are many powers of two apart."""
    return zero.float() - 8 * step.float()


READERS: dict[str, Callable[[Weight], Stored]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _intx,
    "Float8Tensor": _float8,
    "Int4Tensor": _int4,
    "Int4TilePackedTo4dTensor": _tiles,
}


def _need_numbers(
    checkpoint: Checkpoint, name: str, groups: tuple[int, int], dtypes: tuple[torch.dtype, ...]
) -> torch.dtype:
    """The dtype of a tensor with a number for each group, in whatever shape."""
    info = checkpoint.need(name, dtypes=dtypes)
    if math.prod(info.shape) != math.prod(groups):
        raise CheckpointError(f"{name} is {info.shape}; its blocks need {groups}")
    return info.dtype
