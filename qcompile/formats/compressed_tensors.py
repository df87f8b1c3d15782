"""compressed-tensors: what llm-compressor writes. Tensors X of a module, for a weight of (out, in):

    pack-quantized   weight_packed int32 (out, words), weight_shape [out, in], weight_scale (out, groups); asymmetric:
                     weight_zero_point int32 (words, groups), packed along the outputs, before 2025 int8 (out, groups);
                     act-order: weight_g_idx int32 (in,), -1 where unused
    int-quantized    weight int8 (out, in), also for fewer bits; weight_scale; weight_zero_point int8
    float-quantized  weight float8 (out, in), weight_scale by tensor, row or blocks of block_structure
    mxfp8            weight float8, weight_scale uint8 (out, in/32), powers of two
    mxfp4, nvfp4     weight_packed uint8 (out, in/2), the first code in the low half; weight_scale uint8 (out, in/32),
                     or float8 (out, in/16), to be divided by weight_global_scale
    kv_cache_scheme  in the configuration; of attention modules k_scale and v_scale (1,) or (heads, 1, 1), or, before
                     2025, k_proj.output_scale and v_proj.output_scale. Queries that have a scale are not rounded

Codes are signed, stored with half their range added where they are packed. Of 3, 5, 6 and 7 bits old releases put
32 // bits into a word, later ones write a continuous stream; the number of words tells which. Modules find their scheme
by targets: their name, re:<regular expression>, or a class, in this order.
https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint
from qcompile.formats._bits import fields, stream
from qcompile.formats._scaled import FLOAT8, FLOATS, cache_scales, float8, pairs, scaled, shared_by
from qcompile.formats._schemes import Scheme, part, rounding, scheme, schemes
from qcompile.formats.stored import Entry, Read, Stored, finite
from qcompile.quant.element import Element
from qcompile.quant.granularity import PerGroup
from qcompile.quant.spec import QSpec, Zero
from qcompile.quant.tensor import QTensor

# What belongs to a module beside its weight and scale.
BESIDE = (
    *("weight_shape", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale"),
    *("output_scale", "output_zero_point", "output_global_scale"),
)


class CompressedTensors:
    name = "compressed-tensors"

    def claims(self, checkpoint: Checkpoint) -> bool:
        config = _config(checkpoint)
        named = config.get("quant_method") == self.name or "config_groups" in config
        return named or bool(checkpoint.modules("weight_packed"))

    def weights(self, checkpoint: Checkpoint) -> Iterator[Entry]:
        config = _config(checkpoint)
        _refuse(checkpoint, config)
        found = schemes(config)
        for name, info in checkpoint.tensors.items():
            module, _, kind = name.rpartition(".")
            if kind == "weight_packed" or (kind == "weight" and info.dtype in (torch.int8, *FLOAT8)):
                integers = info.dtype in (torch.int32, torch.int8)
                yield (_integers if integers else _floats)(checkpoint, name, scheme(found, module))
            elif kind == "weight" and f"{module}.weight_scale" in checkpoint.tensors:
                raise CheckpointError(
                    f"{name} has scales and is {info.dtype}: the checkpoint was saved before its weights were packed; "
                    "save it with save_compressed=True"
                )
        yield from cache_scales(checkpoint, _cached(part(config, "kv_cache_scheme")))


def _config(checkpoint: Checkpoint) -> Scheme:
    says = checkpoint.quantization
    deeper = says.get("quantization_config")  # where sparseml put it
    return deeper if isinstance(deeper, dict) else says


def _cached(scheme: Scheme) -> str | None:
    """The codes of a KV cache with static scales."""
    if scheme.get("num_bits") != 8 or scheme.get("dynamic") or scheme.get("symmetric") is False:
        return None
    return {"float": "fp8_e4m3", "int": "i8"}.get(str(scheme.get("type")))


def _refuse(checkpoint: Checkpoint, config: Scheme) -> None:
    sparsity, transforms = part(config, "sparsity_config"), part(config, "transform_config")
    stated = {str(config.get("format")), str(sparsity.get("format"))} - {"dense", "None"}
    if sparse := [name for name in stated if "sparse" in name or name == "marlin-24"]:
        raise CheckpointError(f"the weights are sparse, stored as {sparse[0]}, which qcompile does not read")
    if bitmasks := checkpoint.modules("bitmask"):
        raise CheckpointError(f"{bitmasks[0]}.weight is sparse, stored with a bitmask, which qcompile does not read")
    if transforms.get("config_groups", transforms):
        raise CheckpointError(
            "transform_config: the weights belong to rotated activations, and qcompile does not rotate activations"
        )


def _integers(checkpoint: Checkpoint, name: str, own: Scheme) -> Stored:
    module, _, kind = name.rpartition(".")
    scales, zeros = f"{module}.weight_scale", f"{module}.weight_zero_point"
    rows, words = checkpoint.need(name, 2, {torch.int32, torch.int8}).shape
    args = part(own, "weights")
    bits = args.get("num_bits", 8 if kind == "weight" else None)
    if type(bits) is not int or not 1 <= bits <= 8:
        raise CheckpointError(
            f"{module}: the configuration says num_bits {bits!r}, not 1 to 8, and tensors do not tell"
        )
    packed, columns = kind == "weight_packed", words
    if packed:
        checkpoint.need(name, 2, torch.int32)
        columns = _columns(checkpoint, module, rows)
        if words not in _lengths(columns, bits):
            raise CheckpointError(
                f"{name} is {(rows, words)}; {columns} codes of {bits} bits are {_either(columns, bits)} words"
            )
    shape = checkpoint.need(scales, dtypes=FLOATS).shape
    granularity = shared_by(scales, shape, rows, columns, args.get("block_structure"))
    groups = granularity.scale_shape(rows, columns)
    order = which = None
    if (index := _group_index(checkpoint, module, columns, groups[1])) is not None:
        order = None if bool((index[1:] >= index[:-1]).all()) else torch.argsort(index, stable=True)
        # Groups of unequal size become groups of their common divisor, which repeat a scale.
        granularity = PerGroup(size := math.gcd(*index.bincount().tolist()))
        which = (index if order is None else index[order])[::size]
    if index is None and args.get("actorder") in (True, "group", "dynamic") and groups[1] > 1:
        checkpoint.need(f"{module}.weight_g_idx")
    if args.get("symmetric") is False:
        checkpoint.need(zeros)
    _check_zeros(checkpoint, zeros, groups, bits)
    # There is no signed code of one bit: -1 and 0 are 0 and 1 less one.
    zero = Zero.INT if zeros in checkpoint.tensors or bits == 1 else Zero.NONE
    spec = QSpec(Element.parse(f"{'i' if zero is Zero.NONE else 'u'}{bits}"), granularity, zero)

    def read(tensor: Read) -> QTensor:
        stored = tensor(name)
        whole = packed and _is_whole(stored, bits, columns)
        device = stored.device
        places = None if order is None else order.to(device)

        def codes(start: int, stop: int) -> Tensor:
            part = stored[start:stop]
            found = _unpack(part, bits, columns, whole) if packed else _unsigned(name, part, bits)
            return found if places is None else found.index_select(1, places)

        def side(numbers: Tensor) -> Tensor:
            return numbers if which is None else numbers[:, which.to(device)].contiguous()

        scale = side(finite(scales, tensor(scales)).reshape(groups))
        point = None
        if zeros in checkpoint.tensors:
            point = side(_zeros(zeros, tensor(zeros), bits, groups))
        elif zero is Zero.INT:
            point = torch.ones(scale.shape, dtype=torch.uint8, device=device)
        return QTensor.from_rows(spec, (rows, columns), codes, scale, point, places)

    tensors = (name, scales, *_beside(checkpoint, module))
    roundings = (rounding(checkpoint, module, own, side) for side in ("input", "output"))
    return Stored(f"{module}.weight", spec, (rows, columns), tensors, read, *roundings)


def _floats(checkpoint: Checkpoint, name: str, own: Scheme) -> Stored:
    module, scale = name.rpartition(".")[0], f"{name.rpartition('.')[0]}.weight_scale"
    info = checkpoint.need(name, 2, {torch.uint8, *FLOAT8})
    rows, columns = info.shape
    element, codes = FLOAT8.get(info.dtype, "fp4_e2m1"), float8
    if info.dtype == torch.uint8:
        columns, codes = 2 * columns, pairs
    scales = checkpoint.need(scale)
    granularity = shared_by(scale, scales.shape, rows, columns, part(own, "weights").get("block_structure"))
    divisor = f"{module}.weight_global_scale" if scales.dtype in FLOAT8 else None
    path, shape, beside = f"{module}.weight", (rows, columns), _beside(checkpoint, module)
    roundings = (rounding(checkpoint, module, own, side) for side in ("input", "output"))
    return scaled(checkpoint, path, name, scale, element, granularity, shape, codes, divisor, beside, *roundings)


def _beside(checkpoint: Checkpoint, module: str) -> list[str]:
    return [name for kind in BESIDE if (name := f"{module}.{kind}") in checkpoint.tensors]


def _columns(checkpoint: Checkpoint, module: str, rows: int) -> int:
    name = f"{module}.weight_shape"
    checkpoint.need(name, (2,), {torch.int64, torch.int32})
    shape = checkpoint.read(name).tolist()
    if shape[0] != rows or shape[1] < 1:
        raise CheckpointError(f"{name} says {shape}; {module}.weight_packed has {rows} rows")
    return shape[1]


def _lengths(count: int, bits: int) -> tuple[int, int]:
    """Words for so many codes: with 32 // bits in each, and as a continuous stream."""
    return -(-count // (32 // bits)), -(-count * bits // 32)


def _either(count: int, bits: int) -> str:
    return " or ".join(str(words) for words in sorted(set(_lengths(count, bits))))


def _is_whole(words: Tensor, bits: int, count: int) -> bool:
    """Whether words hold 32 // bits codes each along the last dimension."""
    whole, dense = _lengths(count, bits)
    if whole != dense or 32 % bits == 0:
        return words.shape[-1] == whole
    # Both are as long: the bits that would be left over tell.
    return not bool((words & (-1 << bits * (32 // bits))).any())


def _unpack(words: Tensor, bits: int, count: int, whole: bool) -> Tensor:
    return fields(words, bits)[..., :count] if whole else stream(words, bits, count)


def _unsigned(name: str, codes: Tensor, bits: int) -> Tensor:
    """Signed bytes with half the range of `bits` bits added, which makes them uint8 codes."""
    found = codes.view(torch.uint8) + 2 ** (bits - 1)
    if bits < 8 and bool((found >= 2**bits).any()):
        raise CheckpointError(f"{name} holds numbers outside the {bits} bits that the configuration gives it")
    return found


def _check_zeros(checkpoint: Checkpoint, name: str, groups: tuple[int, int], bits: int) -> None:
    if name not in checkpoint.tensors:
        return
    info = checkpoint.need(name, dtypes={torch.int32, torch.int8})
    if info.dtype == torch.int8 and math.prod(info.shape) == math.prod(groups):
        return
    if info.dtype == torch.int32 and info.shape in [(words, groups[1]) for words in _lengths(groups[0], bits)]:
        return
    raise CheckpointError(
        f"{name} is {str(info.dtype).removeprefix('torch.')} {info.shape}; needs int8 {groups}, or int32 with "
        f"{_either(groups[0], bits)} words for {groups[1]} groups"
    )


def _zeros(name: str, stored: Tensor, bits: int, groups: tuple[int, int]) -> Tensor:
    if stored.dtype == torch.int8:
        return _unsigned(name, stored, bits).reshape(groups)
    words = stored.t().contiguous()
    return _unpack(words, bits, groups[0], _is_whole(words, bits, groups[0])).t().contiguous()


def _group_index(checkpoint: Checkpoint, module: str, columns: int, groups: int) -> Tensor | None:
    """The group of each input where the tensors say it."""
    name = f"{module}.weight_g_idx"
    if name not in checkpoint.tensors:
        return None
    checkpoint.need(name, (columns,), {torch.int32, torch.int64})
    index = checkpoint.read(name).long()
    if bool((index == -1).all()):
        return None
    if bool(((index < 0) | (index >= groups)).any()):
        raise CheckpointError(f"{name} has values beyond the {groups} groups of {module}.weight_scale")
    return index if groups > 1 else None
