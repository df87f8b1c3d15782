"""compressed-tensors, as llm-compressor writes it. formats/compressed_tensors.py has the layout.

    pack-quantized         integers of 2 to 8 bits, int32 weight_packed; zero points packed along the outputs
    int-quantized          integers with rounded inputs, a byte each
    float-quantized        fp8_e4m3 with rounded inputs; naive-quantized: without
    nvfp4-pack-quantized   fp4_e2m1/g16 with fp8 scales; mxfp4-pack-quantized: /g32 with powers of two
    mxfp8-quantized        fp8_e4m3/g32 with powers of two

Scales keep their dtype. Weights that are stored and rounded alike are one group of the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.quant.activation import ActivationSpec
from qcompile.quant.granularity import PerBlock, PerGroup, PerRow, PerTensor
from qcompile.quant.packing import unpack
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.writers._bits import neighbours, words
from qcompile.writers._integers import (
    Unwritable,
    exactly,
    in_order,
    integers,
    linear_only,
    nearest,
    plain,
    powers_of_two,
    shared_by,
)
from qcompile.writers.contents import Contents, Tensors, Weight, Writer, cache_tensors, same, write_folder

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
Args = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a weight is stored: the format, what the configuration says of weights and inputs, the module's tensors."""

    format: str
    weights: Args
    inputs: Args | None
    tensors: Tensors


class CompressedTensors(Writer):
    name = "compressed-tensors"
    cache_scales = True

    def refuses(self, weight: Weight) -> str | None:
        try:
            _layout(weight)
        except Unwritable as reason:
            return str(reason)
        return None

    def nearest(self, weight: Weight) -> QSpec | None:
        if weight.spec.element.dtype is not None and nearest(weight, WIDTHS):
            return QSpec.parse("fp8_e4m3/row/sym")
        return nearest(weight, WIDTHS)

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        tensors: Tensors = {}
        groups: list[dict[str, Any]] = []
        for weight in contents.weights:
            layout = _layout(weight)
            tensors |= {f"{weight.module}.{name}": make for name, make in layout.tensors.items()}
            alike = {"format": layout.format, "weights": layout.weights, "input_activations": layout.inputs}
            group = next((group for group in groups if all(group[key] == alike[key] for key in alike)), None)
            if group is None:
                groups.append(group := {**alike, "output_activations": None, "targets": []})
            group["targets"].append(weight.module)
        if len(groups) == 1:
            groups[0]["targets"] = ["Linear"]
        formats = {group["format"] for group in groups}
        said = {
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": list(contents.dense_linears),
            "kv_cache_scheme": _cache(contents),
        }
        write_folder(contents, folder, tensors | cache_tensors(contents), said, largest_shard)


def _cache(contents: Contents) -> Args | None:
    if not contents.caches:
        return None
    kind = {"fp8_e4m3": "float", "i8": "int"}[contents.caches[0].element]
    by_head = any(len(scale) > 1 for cache in contents.caches for scale in (cache.key, cache.value))
    return _args(8, kind, "attn_head" if by_head else "tensor", None)


def _layout(weight: Weight) -> Layout:
    linear_only(weight)
    in_order(weight)
    if weight.output is not None:
        raise Unwritable(f"its outputs are rounded as {weight.output.spec}, which few readers do")
    inputs, beside = _inputs(weight)
    tag = weight.spec.element.tag
    if tag == "fp4_e2m1":
        layout = _fp4(weight)
    elif tag == "fp8_e4m3":
        layout = _fp8(weight, inputs)
    else:
        layout = _integers(weight, inputs)
    return Layout(layout.format, layout.weights, inputs, {**layout.tensors, **beside})


def _integers(weight: Weight, inputs: Args | None) -> Layout:
    one = integers(weight, WIDTHS)
    columns = one.tensor.columns
    tensors: Tensors = {}
    if inputs is None:
        tensors["weight_packed"] = lambda: words(one.codes(), one.bits)
        tensors["weight_shape"] = same(torch.tensor(one.tensor.shape, dtype=torch.int64))
    else:
        tensors["weight"] = lambda: _signed(one.codes(), one.bits)
    tensors["weight_scale"] = same(_floats(one.scale))
    if one.zero is not None:
        zero = one.zero
        packed = inputs is None
        tensors["weight_zero_point"] = lambda: (
            words(zero.t().contiguous(), one.bits).t() if packed else _signed(zero, one.bits)
        )
    by_row = one.size == columns
    args = _args(one.bits, "int", "channel" if by_row else "group", None if by_row else one.size)
    args |= {"symmetric": one.zero is None, "zp_dtype": None if one.zero is None else "torch.int8"}
    return Layout("pack-quantized" if inputs is None else "int-quantized", args, None, tensors)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def _fp8(weight: Weight, inputs: Args | None) -> Layout:
    tensor, kind = weight.tensor, weight.spec.granularity
    tensors: Tensors = {"weight": lambda: unpack(tensor.data, 8, tensor.columns).contiguous().view(torch.float8_e4m3fn)}
    if shared_by(tensor) == 32 and (powers := powers_of_two(tensor.scale)) is not None:
        tensors["weight_scale"] = same(powers)
        args = _args(8, "float", "group", 32, scale_dtype="torch.uint8")
        return Layout("mxfp8-quantized", args, None, tensors)
    scale, block = _floats(plain(tensor.scale)), None
    match kind:
        case PerTensor():
            strategy, size = "tensor", None
            scale = scale.reshape(1)
        case PerRow():
            strategy, size = "channel", None
        case PerGroup(size) if tensor.columns % size == 0:
            strategy = "group"
        case PerBlock(height, width):
            strategy, size, block = "block", None, [height, width]
        case _:
            raise Unwritable(f"fp8 with scales by {kind}")
    tensors["weight_scale"] = same(scale)
    args = _args(8, "float", strategy, size) | {"block_structure": block}
    return Layout("naive-quantized" if inputs is None else "float-quantized", args, None, tensors)


def _fp4(weight: Weight) -> Layout:
    tensor = weight.tensor

    tensors: Tensors = {"weight_packed": lambda: neighbours(unpack(tensor.data, 4, tensor.columns), 4)}
    if shared_by(tensor) == 32 and (powers := powers_of_two(tensor.scale)) is not None:
        tensors["weight_scale"] = same(powers)
        args = _args(4, "float", "group", 32, scale_dtype="torch.uint8")
        return Layout("mxfp4-pack-quantized", args, None, tensors)
    if shared_by(tensor) == 16 and (scales := _scaled_floats(tensor.scale)) is not None:
        tensors["weight_scale"], tensors["weight_global_scale"] = same(scales[0]), same(scales[1])
        args = _args(4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")
        return Layout("nvfp4-pack-quantized", args, None, tensors)
    raise Unwritable("fp4 comes in groups of 32 with powers of two, or of 16 with fp8 scales divided by one number")


def _scaled_floats(scale: Tensor | QTensor) -> tuple[Tensor, Tensor] | None:
    """fp8 scales and the number that divides them all; None where they are not such."""
    if isinstance(scale, Tensor):
        return (scale, torch.ones(1)) if scale.dtype == torch.float8_e4m3fn else None
    if str(scale.spec) != "fp8_e4m3/tensor/sym":
        return None
    floats = unpack(scale.data, 8, scale.columns).contiguous().view(torch.float8_e4m3fn)
    divisor = (1 / plain(scale.scale).double()).reshape(1).float()
    # Products and quotients agree, rounded to float32.
    return (floats, divisor) if torch.equal(plain(scale), (floats.double() / divisor.double()).float()) else None


def _floats(scale: Tensor) -> Tensor:
    return exactly(scale, torch.float32) if scale.dtype == torch.float64 else scale


def _inputs(weight: Weight) -> tuple[Args | None, Tensors]:
    """What the configuration says of the inputs, and the tensors that they are static by. Raises Unwritable."""
    if weight.input is None:
        return None, {}
    spec = ActivationSpec.parse(weight.input.spec)
    tag = spec.element.tag
    float_bits = {"fp8_e4m3": 8, "fp4_e2m1": 4}.get(tag)
    bits, kind = (float_bits, "float") if float_bits else (int(tag[1:]) if tag[0] in "iu" else None, "int")
    special = [option for option in (spec.ceiling, spec.floor, spec.outliers) if option is not None]
    # Half the range of floats is their largest one.
    halved = spec.half or spec.static or kind == "float" or spec.is_asymmetric
    nested = {"fp8_e4m3": ("fp4_e2m1", "g16"), "e8m0": (tag, "g32"), None: (tag, spec.granularity)}
    if bits is None or special or not (halved or spec.scale) or (tag, spec.granularity) != nested[spec.scale]:
        raise Unwritable(f"its inputs are rounded as {spec}, which it cannot say")
    if tag == "fp4_e2m1" and spec.granularity == "g32" and spec.scale is None:
        raise Unwritable(f"its inputs are rounded as {spec}, which it reads as with powers of two")
    strategy = {"token": "token", "tensor": "tensor"}.get(spec.granularity, "group")
    args = _args(bits, kind, strategy, spec.group, symmetric=not spec.is_asymmetric) | {"dynamic": not spec.static}
    tensors: Tensors = {}
    if spec.scale == "fp8_e4m3":
        assert weight.input.scale is not None
        args |= {"strategy": "tensor_group", "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
        tensors["input_global_scale"] = same(weight.input.scale.reshape(1).float())
    elif spec.scale == "e8m0":
        args["scale_dtype"] = "torch.uint8"
    elif spec.static:
        assert weight.input.scale is not None
        tensors["input_scale"] = same(weight.input.scale.reshape(1))
        if (zero := weight.input.zero) is not None:
            tensors["input_zero_point"] = same((zero.reshape(1).to(torch.int16) - 2 ** (bits - 1)).to(torch.int8))
            args["zp_dtype"] = "torch.int8"
    return args, tensors


def _args(bits: int, kind: str, strategy: str, size: int | None, **more: Any) -> Args:
    args = {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": size, "symmetric": True}
    return args | {"dynamic": False, "block_structure": None, "actorder": None, **more}
