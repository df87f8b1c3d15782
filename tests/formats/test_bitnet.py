"""BitNet."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats import Stored
from qcompile.formats.bitnet import BitNet
from qcompile.quant import tensor
from qcompile.quant.activation import ActivationSpec


def test_weights_and_logits(check_optimized: Callable) -> None:
    check_optimized("bitnet-offline")


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear", None])
@pytest.mark.parametrize("piece", [1 << 24, 30], ids=["at-once", "row-by-row"])
def test_planes(tmp_path: Path, kind: str | None, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "SLICE", piece)
    values, scale = torch.randint(-1, 2, (12, 10)), torch.tensor([3.25]).bfloat16()
    packed = torch.zeros(3, 10, dtype=torch.uint8)
    for row in range(12):
        for column in range(10):
            packed[row % 3, column] |= int(values[row, column] + 1) << 2 * (row // 3)
    (weight,) = written(tmp_path, {"m.weight": packed, "m.weight_scale": scale}, kind)
    factor = scale.float() if kind == "autobitlinear" else 1 / scale.float()
    assert torch.equal(weight.read(open_checkpoint(tmp_path).read).dequantize(), values * factor)
    assert weight.input is not None and str(ActivationSpec.parse(weight.input.spec)) == "i8/token/dynamic/min(1e-05)"


PACKED = torch.zeros(2, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"m.weight": PACKED + 3}, "bitlinear", "m.weight holds the code 3"),
        ({"m.weight": PACKED.float()}, "bitlinear", "m.weight is float32, not uint8"),
        ({"m.weight_scale": torch.ones(2)}, "bitlinear", r"m.weight_scale is \(2,\), not \(1,\)"),
        ({"m.weight_scale": torch.zeros(1)}, "bitlinear", "m.weight_scale is 0 and divides"),
        ({"m.weight_scale": torch.tensor([math.nan])}, "bitlinear", "m.weight_scale holds numbers that are infinite"),
        ({"m.weight_scale": None}, "bitlinear", "no weight is packed"),
        ({"m.rms_norm.weight": torch.ones(4)}, "bitlinear", "m normalizes its own input"),
        ({}, "linear", "unknown linear_class 'linear'"),
    ],
)
def test_errors(tmp_path: Path, change: dict[str, Tensor | None], kind: str, message: str) -> None:
    tensors = {"m.weight": PACKED, "m.weight_scale": torch.ones(1)} | change
    with pytest.raises(CheckpointError, match=message):
        (weight,) = written(tmp_path, {name: t for name, t in tensors.items() if t is not None}, kind)
        weight.read(open_checkpoint(tmp_path).read)


def written(folder: Path, tensors: dict[str, Tensor], kind: str | None) -> list[Stored]:
    save_file(tensors, folder / "model.safetensors")
    config = {"quant_method": "bitnet", **({"linear_class": kind} if kind else {})}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    checkpoint = open_checkpoint(folder)
    assert BitNet().claims(checkpoint)
    return list(BitNet().weights(checkpoint))
