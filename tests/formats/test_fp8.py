"""fp8."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.load import load

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
SCALAR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


@pytest.mark.parametrize("name", ["fp8-block128", "fp8-block32-ue8m0"])
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name)


def test_a_cache_may_have_scales(tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINTS / "fp8-tensor-dynamic", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("k_scale", "v_scale", "k_proj.output_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.ones(())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="has 1 scales of a quantized KV cache, which are not used"):
        load(str(folder), progress=False)


def test_optimized(check_optimized: Callable) -> None:
    check_optimized("fp8-tensor-dynamic")


def floats(*shape: int) -> Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def tiled(weight: Tensor, scale: Tensor, height: int, width: int) -> Tensor:
    """The definition, one element at a time."""
    result = torch.empty(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            result[row, column] = weight[row, column].float() * scale[row // height, column // width].float()
    return result


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale", "qscale_weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_blocks_may_be_cut_off(stored_of: Callable, name: str, dtype: torch.dtype) -> None:
    weight, scale = floats(160, 200), torch.rand(2, 2).to(dtype)
    stored, got = stored_of({"a.weight": weight, f"a.{name}": scale}, BLOCKS)["a.weight"]
    assert torch.equal(got.dequantize(), tiled(weight, scale, 128, 128))
    assert got.scale.dtype == dtype
    assert str(stored.spec) == "fp8_e4m3/b128x128/sym"
    assert stored.input is not None
    assert stored.input.spec == "fp8_e4m3/g128/dynamic"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_powers_of_two_are_a_byte_each(stored_of: Callable, dtype: torch.dtype) -> None:
    weight, codes = floats(48, 64), torch.tensor([[0, 126], [127, 130]], dtype=torch.uint8)
    config = {**BLOCKS, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}
    _, got = stored_of({"a.weight": weight, "a.weight_scale_inv": codes.view(dtype)}, config)["a.weight"]
    assert torch.equal(got.dequantize(), tiled(weight, 2.0 ** (codes.float() - 127), 32, 32))
    assert str(got.spec) == "fp8_e4m3/b32x32/sym/scale(e8m0/tensor/sym)"


def test_mx_groups(stored_of: Callable) -> None:
    weight, codes = floats(8, 96), torch.randint(120, 130, (8, 3), dtype=torch.uint8)
    config = {"quant_method": "mxfp8", "weight_block_size": [1, 32]}
    stored, got = stored_of({"a.weight": weight, "a.weight_scale_inv": codes}, config)["a.weight"]
    assert torch.equal(got.dequantize(), tiled(weight, 2.0 ** (codes.float() - 127), 1, 32))
    assert stored.input is not None
    assert stored.input.spec == "fp8_e4m3/g32/dynamic/scale(e8m0)"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    ("scale", "input_scale"),
    [("weight_scale_inv", "activation_scale"), ("weight_scale", "input_scale"), ("qscale_weight", "qscale_act")],
)
def test_one_scale_and_static_inputs(stored_of: Callable, shape: tuple, scale: str, input_scale: str) -> None:
    weight, number = floats(8, 16), torch.rand(shape)
    tensors = {"a.weight": weight, f"a.{scale}": number, f"a.{input_scale}": torch.tensor(0.5)}
    stored, got = stored_of(tensors, SCALAR)["a.weight"]
    assert torch.equal(got.dequantize(), weight.float() * number.item())
    assert set(stored.tensors) == set(tensors)
    assert stored.input is not None
    assert (stored.input.spec, stored.input.scale) == ("fp8_e4m3/tensor/static", f"a.{input_scale}")


def test_without_rounded_inputs(stored_of: Callable) -> None:
    tensors = {"a.weight": floats(8, 16), "a.weight_scale": torch.rand(())}
    assert stored_of(tensors, {**SCALAR, "activation_scheme": None})["a.weight"][0].input is None


def test_experts_in_4_bits(stored_of: Callable) -> None:
    packed, codes = torch.randint(-128, 128, (4, 32), dtype=torch.int8), torch.full((4, 2), 128, dtype=torch.uint8)
    _, got = stored_of({"a.weight": packed, "a.scale": codes.view(torch.float8_e8m0fnu)}, BLOCKS)["a.weight"]
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    want = [[2 * table[byte >> 4 * half & 15] for byte in row for half in (0, 1)] for row in packed.tolist()]
    assert got.dequantize().tolist() == want


def test_a_stack_of_experts(stored_of: Callable) -> None:
    weight, scale = floats(3, 64, 64), torch.rand(3, 2, 2)
    config = {**BLOCKS, "weight_block_size": [32, 32]}
    _, got = stored_of({"e.gate_up_proj": weight, "e.gate_up_proj_scale_inv": scale}, config)["e.gate_up_proj"]
    for expert in range(3):
        assert torch.equal(got.dequantize()[expert], tiled(weight[expert], scale[expert], 32, 32))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"a.weight_scale_inv": None}, {}, "a.weight is 8-bit floats without a scale; a.weight_scale_inv was expected"),
        ({"a.weight_scale_inv": torch.rand(2, 3)}, {}, r"a.weight_scale_inv is \(2, 3\).* blocks of 128x128"),
        ({}, {"weight_block_size": None}, r"\(160, 200\) is neither .* the configuration says nothing"),
        ({}, {"weight_block_size": 128}, "a block is '128', not the height and the width"),
        ({}, {"weight_block_size": [0, 128]}, "not the height and the width"),
        ({"a.weight_scale_inv": torch.full((2, 2), torch.nan)}, {}, "a.weight_scale_inv holds numbers that are inf"),
        ({"a.weight_scale_inv": torch.full((2, 2), 255).byte()}, {}, "a.weight_scale_inv holds numbers that are inf"),
        ({"a.weight_scale_inv": torch.ones(2, 2, dtype=torch.int32)}, {}, "a.weight_scale_inv is int32, not"),
        ({}, {"activation_scheme": "static"}, "a.activation_scale is missing"),
        ({"a.weight": floats(160)}, {}, r"a.weight is \(160,\), neither a matrix"),
        ({"a.weight": floats(2, 80, 200)}, {}, "run over the end of experts with 80 rows"),
    ],
)
def test_contradictions_are_named(stored_of: Callable, change: dict, config: dict, message: str) -> None:
    tensors = {"a.weight": floats(160, 200), "a.weight_scale_inv": torch.rand(2, 2), **change}
    with pytest.raises(CheckpointError, match=message):
        stored_of({name: tensor for name, tensor in tensors.items() if tensor is not None}, {**BLOCKS, **config})
