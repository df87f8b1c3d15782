"""HQQ in the form of transformers: codes with float zero points, grouped over the flat weight. formats/hqq.py has the
layout; a linear is 19 tensors, which describe it completely.

    W_q uint8, 3 bits int32; scale, zero (groups, 1) for axis 1 and (1, groups) for axis 0; shape, nbits, …
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.quant.granularity import PerGroup, PerOutputGroup
from qcompile.quant.packing import unpack
from qcompile.quant.spec import QSpec, Zero
from qcompile.writers._bits import signed
from qcompile.writers._integers import (
    Unwritable,
    by_inputs,
    exactly,
    in_order,
    linear_only,
    nearest,
    plain,
    weights_only,
)
from qcompile.writers.contents import Contents, Tensors, Weight, Writer, same, write_folder

# Name of the packing, bits of a field, fields of a word.
PACKINGS = {
    1: ("1bit_u8", 1, 8),
    2: ("2bit_u8", 2, 4),
    3: ("3bit_32", 3, 10),
    4: ("4bit_u8", 4, 2),
    8: ("8bit_u8", 8, 1),
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Layout:
    """How a weight lies: the bits and the groups that HQQ has for it, its scales and zero points in one dtype."""

    bits: int
    axis: int
    size: int
    scale: Tensor
    zero: Tensor


class Hqq(Writer):
    name = "hqq"

    def refuses(self, weight: Weight) -> str | None:
        try:
            _layout(weight)
        except Unwritable as reason:
            return str(reason)
        return None

    def nearest(self, weight: Weight) -> QSpec | None:
        return nearest(weight, tuple(PACKINGS), Zero.FLOAT)

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        tensors: Tensors = {}
        params: dict[str, dict[str, Any]] = {}
        for weight in contents.weights:
            layout = _layout(weight)
            tensors[f"{weight.module}.W_q"] = lambda weight=weight, layout=layout: _packed(weight, layout)
            described = _described(weight, layout)
            tensors |= {f"{weight.module}.{name}": same(tensor) for name, tensor in described.items()}
            params[weight.module] = _params(layout)
        said = {
            "quant_method": "hqq",
            "quant_config": _config(params),
            "skip_modules": list(contents.dense_linears),
        }
        write_folder(contents, folder, tensors, said, largest_shard)


def _layout(weight: Weight) -> Layout:
    linear_only(weight)
    in_order(weight)
    tensor, spec = weight.tensor, weight.spec
    if spec.element.is_float:
        raise Unwritable(f"{spec.element} codes are not integers")
    weights_only(weight)
    if spec.zero is Zero.SHIFT:
        raise Unwritable("its zero points are added after scaling, HQQ's before")
    bits = next(width for width in PACKINGS if width >= spec.element.bits)
    axis = 0 if isinstance(spec.granularity, PerOutputGroup) else 1
    if isinstance(spec.granularity, PerOutputGroup | PerGroup):  # over the flat weight, as HQQ's are
        size, scale = spec.granularity.size, plain(tensor.scale)
        zero = None if tensor.zero is None else plain(tensor.zero)
    else:
        scale, size = by_inputs(tensor, tensor.scale)
        zero = by_inputs(tensor, tensor.zero)[0] if tensor.zero is not None else None
    if zero is None:
        zero = torch.full_like(scale, spec.offset)
    dtype = next((dtype for dtype in (scale.dtype, *FLOATS) if dtype in FLOATS and _fit(scale, zero, dtype)), None)
    if dtype is None:
        raise Unwritable("scales and zero points that no float32 holds")
    groups = (-1, 1) if axis else (1, -1)
    return Layout(bits, axis, size, *(side.to(dtype).reshape(groups) for side in (scale, zero)))


def _fit(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> bool:
    try:
        return bool(exactly(scale, dtype).numel() and exactly(zero, dtype).numel())
    except Unwritable:
        return False


def _packed(weight: Weight, layout: Layout) -> Tensor:
    """The groups as a matrix, whose rows are cut into as many blocks as a word has fields, the first in the highest."""
    _, width, count = PACKINGS[layout.bits]
    codes = unpack(weight.tensor.data, weight.spec.element.bits, weight.tensor.columns)
    matrix = codes.reshape((-1, layout.size) if layout.axis else (layout.size, -1))
    padded = torch.nn.functional.pad(matrix, (0, 0, 0, -matrix.shape[0] % count))
    found = torch.zeros_like(padded[: len(padded) // count], dtype=torch.int64)
    for place, block in enumerate(padded.chunk(count)):
        found |= block.to(torch.int64) << width * (count - 1 - place)
    return signed(found) if width == 3 else found.to(torch.uint8)


def _described(weight: Weight, layout: Layout) -> dict[str, Tensor]:
    """The tensors beside the codes; those without a meaning for reading say what transformers' HqqConfig would."""
    flags = {"quant_scale": 0, "quant_zero": 0, "view_as_float": 0, "channel_wise": 1, "optimize": 1}
    flags |= {"round_zero": int(layout.bits == 4), "offload_meta": 0, "encoded_state_dict": 1, "stores_quant_config": 1}
    numbers = {"nbits": layout.bits, "group_size": layout.size, "axis": layout.axis}
    texts = {
        "packing": PACKINGS[layout.bits][0],
        "unpack_view_dtype": "torch.int32" if layout.bits == 3 else "torch.uint8",
        "compute_dtype": str(layout.scale.dtype),
    }
    return {
        "scale": layout.scale,
        "zero": layout.zero,
        "shape": torch.tensor(weight.tensor.shape, dtype=torch.int64),
        **{name: torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()},
        **{name: torch.tensor(flag, dtype=torch.uint8) for name, flag in flags.items()},
        **{name: torch.tensor(list(text.encode("ascii")), dtype=torch.uint8) for name, text in texts.items()},
    }


def _params(layout: Layout) -> dict[str, Any]:
    own = {"nbits": layout.bits, "group_size": layout.size, "axis": layout.axis}
    own |= {"channel_wise": True, "optimize": True, "round_zero": layout.bits == 4, "view_as_float": False}
    return {"weight_quant_params": own, "scale_quant_params": None, "zero_quant_params": None, "offload_meta": False}


def _config(params: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One scheme for all, or one for each kind of linear: of those that differ from layer to layer the first one, since
    the tensors say it anyhow."""
    kinds: dict[str, dict[str, Any]] = {}
    for module, own in params.items():
        parts = [
            part for part in module.split(".") if part not in ("model", "layers") and not re.fullmatch(r"\d+", part)
        ]
        kinds.setdefault(".".join(parts), own)
    schemes = list(kinds.values())
    return schemes[0] if schemes and all(own == schemes[0] for own in schemes) else kinds
