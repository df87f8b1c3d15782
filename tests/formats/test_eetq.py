"""EETQ."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats.eetq import Eetq
from qcompile.quant import tensor


def test_weights_and_logits(check_optimized: Callable) -> None:
    check_optimized("eetq-int8")


@pytest.mark.parametrize("name", ["weight", "qweight"])
@pytest.mark.parametrize("piece", [1 << 24, 200], ids=["at-once", "row-by-row"])
def test_order(tmp_path: Path, name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor, "SLICE", piece)
    codes, scales = torch.randint(-128, 128, (6, 128), dtype=torch.int8), torch.rand(6).half() + 0.1
    got = read(tmp_path, {f"m.{name}": packed(codes), "m.weight_scales": scales})
    assert torch.equal(got, codes * scales.float().reshape(-1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m.weight": torch.ones(96, 2, dtype=torch.int8)}, r"m.weight is \(96, 2\); EETQ's order needs"),
        ({"m.weight": torch.ones(64, 2)}, "m.weight is float32, not int8"),
        ({"m.weight_scales": torch.ones(3)}, r"m.weight_scales is \(3,\), not \(2,\)"),
        ({"m.weight_scales": torch.tensor([1, math.inf])}, "m.weight_scales holds numbers that are infinite"),
        ({"m.weight": None}, "m.weight is missing"),
    ],
)
def test_errors(tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
    tensors = {"m.weight": torch.ones(64, 2, dtype=torch.int8), "m.weight_scales": torch.ones(2)} | change
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def packed(codes: Tensor) -> Tensor:
    """(out, in) int8 in the five steps of EETQ's packer; the shape of the result is (in, out)."""
    rows, columns = codes.shape
    order = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
    flat = []
    for pair in range(0, rows, 2):
        for run in range(0, columns, 64):
            for row in (pair, pair + 1):
                flat += [int(codes[row, run + n - n % 16 + order[n % 16]]) for n in range(64)]
    flat = [(code + 128) % 256 for code in flat]
    for word in range(0, len(flat), 4):
        flat[word + 1], flat[word + 2] = flat[word + 2], flat[word + 1]
    return torch.tensor(flat, dtype=torch.uint8).view(torch.int8).reshape(columns, rows)


def read(folder: Path, tensors: dict[str, Tensor]) -> Tensor:
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "eetq"}}')
    checkpoint = open_checkpoint(folder)
    assert Eetq().claims(checkpoint)
    (weight,) = Eetq().weights(checkpoint)
    assert weight.path == "m.weight" and set(weight.tensors) == set(tensors)
    return weight.read(checkpoint.read).dequantize()
