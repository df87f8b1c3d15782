"""MLX's affine integers; transformers' own packer and unpacker are the reference."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint, open_checkpoint
from qcompile.formats.metal import Metal

reference = pytest.importorskip("transformers.integrations.metal_quantization")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights(tmp_path: Path, bits: int, dtype: torch.dtype) -> None:
    packed, scales, qbiases = reference._affine_quantize_tensor(torch.randn(6, 64), 16, bits)
    scales, qbiases = scales.to(dtype), qbiases.to(dtype)
    checkpoint = written(tmp_path, {"m.weight": packed, "m.scales": scales, "m.qbiases": qbiases}, (6, 64))
    (weight,) = Metal().weights(checkpoint)
    got, want = weight.read(checkpoint.read), reference._affine_dequantize_tensor(packed, scales, qbiases, 16, bits)
    assert str(weight.spec) == f"u{bits}/g16/shift" and set(weight.tensors) == set(checkpoint.tensors)
    assert torch.equal(got.dequantize(), want)


GOOD = {"m.weight": torch.zeros(2, 8, dtype=torch.uint32), "m.scales": torch.ones(2, 4), "m.qbiases": torch.ones(2, 4)}


@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        ({}, 80, "which is no 2, 4 or 8 bits of 80 inputs"),
        ({"m.weight": torch.zeros(2, 8)}, 64, "m.weight is float32, not uint32"),
        ({"m.qbiases": torch.ones(2, 3)}, 64, r"m.qbiases is \(2, 3\), not \(2, 4\)"),
        ({"m.scales": torch.full((2, 4), torch.inf)}, 64, "m.scales holds numbers that are infinite"),
    ],
)
def test_errors(tmp_path: Path, change: dict[str, Tensor], columns: int, message: str) -> None:
    checkpoint = written(tmp_path, GOOD | change, (2, columns))
    with pytest.raises(CheckpointError, match=message):
        (weight,) = Metal().weights(checkpoint)
        weight.read(checkpoint.read)


def written(folder: Path, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    checkpoint.shapes = {"m.weight": shape}
    assert Metal().claims(checkpoint)
    return checkpoint
