"""GPTQ: integer codes packed along the inputs. formats/gptq.py has the layout.

    qweight int32 (in * bits/32, out), qzeros int32 (groups, out * bits/32), scales fp16 (groups, out), g_idx int32 (in)

Symmetric weights have the middle of the codes as zero points, stored less one, which every reader knows
(checkpoint_format gptq). Where there are other zero points, all are stored as they are (gptq_v2): readers do not agree
on a 0 less one, and GPTQModel takes others less one only from itself. Weights with other bits or groups than most, and
linears that stay dense, are listed in GPTQModel's `dynamic`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.quant.spec import QSpec
from qcompile.writers._bits import words
from qcompile.writers._integers import Integers, Unwritable, exactly, integers, linear_only, nearest, weights_only
from qcompile.writers.contents import Contents, Tensors, Weight, Writer, same, write_folder

WIDTHS = (2, 3, 4, 8)


class Gptq(Writer):
    name = "gptq"
    scales = torch.float16

    def refuses(self, weight: Weight) -> str | None:
        try:
            _integers(weight)
        except Unwritable as reason:
            return str(reason)
        return None

    def nearest(self, weight: Weight) -> QSpec | None:
        return None if weight.tensor.rows % 32 or weight.tensor.columns % 32 else nearest(weight, WIDTHS)

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        found = {weight.module: _integers(weight) for weight in contents.weights}
        v2 = any(one.zero is not None for one in found.values())
        tensors: Tensors = {}
        for module, one in found.items():
            zeros = one.zeros().t() - (0 if v2 else 1)
            tensors[f"{module}.qweight"] = lambda one=one: words(one.codes(), one.bits).t()
            tensors[f"{module}.qzeros"] = same(words(zeros, one.bits))
            tensors[f"{module}.scales"] = same(one.scale.t())
            tensors[f"{module}.g_idx"] = same(_groups(one))
        write_folder(contents, folder, tensors, _said(contents, found, v2), largest_shard)


def _integers(weight: Weight) -> Integers:
    linear_only(weight, transposed=True)
    rows, columns = weight.tensor.rows, weight.tensor.columns
    if rows % 32 or columns % 32:
        raise Unwritable(f"{rows} outputs and {columns} inputs; it packs multiples of 32")
    found = integers(weight, WIDTHS)
    weights_only(weight)
    return replace(found, scale=exactly(found.scale, torch.float16))


def _groups(one: Integers) -> Tensor:
    """The group of each input."""
    columns = one.tensor.columns
    groups = torch.arange(columns, dtype=torch.int32) // one.size
    if one.tensor.order is None:
        return groups
    return torch.empty_like(groups).index_copy_(0, one.tensor.order.cpu(), groups)


def _said(contents: Contents, found: Mapping[str, Integers], v2: bool) -> dict[str, Any]:
    grouped = [one.size for one in found.values() if one.size != one.tensor.columns]
    usual = Counter(grouped).most_common(1)[0][0] if grouped else -1
    each = {
        module: (one.bits, -1 if one.size == one.tensor.columns != usual else one.size) for module, one in found.items()
    }
    bits, size = Counter(each.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, int]] = {}
    for module, own in each.items():
        if own != (bits, size):
            dynamic[f"+:^{re.escape(module)}$"] = {"bits": own[0], "group_size": own[1]}
    heads = {weight.module for weight in contents.weights if weight.kind == "head"}
    dynamic |= {f"-:^{re.escape(module)}$": {} for module in contents.dense_linears if not module.endswith("lm_head")}
    order = any(one.tensor.order is not None for one in found.values())
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "sym": not v2,
        "desc_act": order,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "pack_dtype": "int32",
        "lm_head": bool(heads),
        **({"dynamic": dynamic} if dynamic else {}),
    }
