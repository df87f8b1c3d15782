"""Gemma's integers; transformers' own layers are the reference."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint, open_checkpoint
from qcompile.formats import Stored
from qcompile.formats.gemma import Gemma

reference = pytest.importorskip("transformers.integrations.gemma_quant")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [32, 13])
def test_linear(tmp_path: Path, bits: int, columns: int) -> None:
    layer = reference.QuantizedLinear(columns, 6, num_bits=bits)
    fill(layer.weight, layer.weight_scale)
    state = {f"m.{name}": tensor for name, tensor in layer.state_dict().items()}
    state |= {"m.input_activation_scale": torch.tensor(0.5), "m.k_cache_scale": torch.ones(())}
    checkpoint = written(tmp_path, state, (6, columns))
    weight, ignored = Gemma().weights(checkpoint)
    assert isinstance(weight, Stored) and ignored.tensors == ("m.k_cache_scale",)  # type: ignore[union-attr]
    assert torch.equal(weight.read(checkpoint.read).dequantize(), layer._dequantize_weights())
    assert weight.input is not None and weight.input.scale == "m.input_activation_scale"
    assert weight.output is None  # its scale is 0


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_embedding(tmp_path: Path, bits: int, groups: int) -> None:
    table = reference.QuantizedEmbedding(9, 32, torch.float32, num_bits=bits)
    table.embedding_scale.data = torch.ones(9, groups)
    fill(table.embedding_quantized, table.embedding_scale)
    state = {f"m.{name}": tensor for name, tensor in table.state_dict().items()}
    checkpoint = written(tmp_path, state, (9, 32))
    weight, _ = Gemma().weights(checkpoint)
    assert isinstance(weight, Stored) and weight.path == "m.weight"
    assert torch.equal(weight.read(checkpoint.read).dequantize(), table.weight)


GOOD: dict[str, Any] = {"m.weight": torch.zeros(2, 8, dtype=torch.uint8), "m.weight_scale": torch.ones(2, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m.weight": torch.zeros(2, 7, dtype=torch.uint8)}, "16 inputs in 4 or 2 bits have another width"),
        ({"m.weight": torch.zeros(2, 8)}, "m.weight is float32, not uint8 or int8"),
        ({"m.weight_scale": torch.ones(3, 1)}, r"m.weight_scale is \(3, 1\), not \(2, 1\)"),
        ({"m.weight_scale": torch.full((2, 1), torch.nan)}, "m.weight_scale holds numbers that are infinite"),
    ],
)
def test_errors(tmp_path: Path, change: dict[str, Tensor], message: str) -> None:
    checkpoint = written(tmp_path, GOOD | change, (2, 16))
    with pytest.raises(CheckpointError, match=message):
        weight, _ = Gemma().weights(checkpoint)
        assert isinstance(weight, Stored)
        weight.read(checkpoint.read)


def fill(codes: Tensor, scale: Tensor) -> None:
    low, high = (0, 256) if codes.dtype == torch.uint8 else (-128, 128)
    codes.data = torch.randint(low, high, codes.shape, dtype=codes.dtype)
    scale.data = torch.rand(scale.shape) + 0.1


def written(folder: Path, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Checkpoint:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gemma"}}))
    checkpoint = open_checkpoint(folder)
    checkpoint.shapes = {"m.weight": shape}
    assert Gemma().claims(checkpoint)
    return checkpoint
