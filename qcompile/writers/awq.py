"""AWQ's gemm layout: 4-bit codes with integer zero points. formats/awq.py has the layout.

    qweight int32 (in, out/8), qzeros int32 (groups, out/8), scales fp16 (groups, out)

The configuration has one group size for all weights: where they differ, larger groups repeat their numbers for groups
of the common divisor. The output layer and embeddings stay dense, as in every AWQ checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from qcompile.quant.spec import QSpec
from qcompile.writers._bits import words
from qcompile.writers._integers import (
    Integers,
    Unwritable,
    exactly,
    in_order,
    integers,
    linear_only,
    nearest,
    weights_only,
)
from qcompile.writers.contents import Contents, Tensors, Weight, Writer, same, write_folder

# The outputs of a word, from its lowest bits up.
INTERLEAVED = [0, 2, 4, 6, 1, 3, 5, 7]


class Awq(Writer):
    name = "awq"
    scales = torch.float16
    scaled_activations = True

    def refuses(self, weight: Weight) -> str | None:
        try:
            _integers(weight)
        except Unwritable as reason:
            return str(reason)
        return None

    def nearest(self, weight: Weight) -> QSpec | None:
        return None if weight.kind == "head" or weight.tensor.rows % 8 else nearest(weight, (4,))

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        found = {weight.module: _integers(weight) for weight in contents.weights}
        whole = all(one.size == one.tensor.columns for one in found.values())
        size = -1 if whole else math.gcd(*(one.size for one in found.values()))
        tensors: Tensors = {}
        for module, one in found.items():
            repeats = 1 if whole else one.size // size
            tensors[f"{module}.qweight"] = lambda one=one: _packed(one.codes().t())
            for name, numbers in (("qzeros", one.zeros()), ("scales", one.scale)):
                numbers = numbers.repeat_interleave(repeats, 1).t().contiguous()
                tensors[f"{module}.{name}"] = same(_packed(numbers) if name == "qzeros" else numbers)
        said = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": size,
            "zero_point": True,
            "modules_to_not_convert": list(contents.dense_linears) or None,
        }
        write_folder(contents, folder, tensors, said, largest_shard)


def _integers(weight: Weight) -> Integers:
    linear_only(weight, head=False)
    in_order(weight)
    if weight.tensor.rows % 8:
        raise Unwritable(f"{weight.tensor.rows} outputs; a word holds 8")
    found = integers(weight, (4,))
    weights_only(weight)
    return replace(found, scale=exactly(found.scale, torch.float16))


def _packed(codes: Tensor) -> Tensor:
    """(…, out) → int32 (…, out/8)."""
    return words(codes.unflatten(-1, (-1, 8))[..., INTERLEAVED].flatten(-2), 4)
