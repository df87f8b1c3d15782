"""A plain float32 checkpoint: every weight as the numbers that it stands for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qcompile.files.write import write_json, write_shards
from qcompile.quant.spec import QSpec
from qcompile.writers.contents import Contents, Tensors, Weight, Writer


class Float(Writer):
    name = "float"

    def check(self, contents: Contents) -> None:
        return

    def refuses(self, weight: Weight) -> str | None:
        return None

    def nearest(self, weight: Weight) -> QSpec | None:
        return None

    def write(self, contents: Contents, folder: Path, largest_shard: int) -> None:
        tensors: Tensors = {}
        for name, tensor in contents.dense.items():
            tensors[name] = lambda tensor=tensor: tensor.float() if tensor.is_floating_point() else tensor
        for weight in contents.weights:
            tensors[weight.path] = lambda weight=weight: _numbers(weight)
        write_json(folder / "config.json", {**contents.config, "dtype": "float32"})
        write_shards(folder, tensors, largest_shard, {})


def _numbers(weight: Weight) -> Tensor:
    numbers = weight.tensor.dequantize(torch.float32)
    return numbers.transpose(-1, -2) if weight.transposed else numbers
