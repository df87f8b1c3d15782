"""torchao."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import open_checkpoint
from qcompile.formats import Stored
from qcompile.formats.stored import Rounding
from qcompile.formats.torchao import TorchAO


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("int8wo", torch.bfloat16),
        ("int8dyn-int8", torch.bfloat16),
        ("float8wo", torch.bfloat16),
        ("float8dyn-row", torch.bfloat16),
        ("int8dyn-int4", torch.float32),
        ("int4wo-plain-g32", torch.float32),
    ],
)
def test_weights_and_logits(check: Callable, name: str, dtype: torch.dtype) -> None:
    check(f"torchao-{name}", dtype)


def test_optimized(check_optimized: Callable) -> None:
    check_optimized("torchao-int8wo", torch.bfloat16)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", [torch.int8, torch.float16, None])
def test_integers_of_any_width(tmp_path: Path, bits: int, zero: torch.dtype | None) -> None:
    half = 2 ** (bits - 1)
    q = torch.randint(-half, half, (4, 24), dtype=torch.int8)
    scale = torch.rand(4, 3).half()
    shift = torch.zeros(4, 3, dtype=torch.int8) if zero is None else torch.randint(-half, half, (4, 3)).to(zero)
    (weight,) = written(
        tmp_path,
        "IntxUnpackedToInt8Tensor",
        {"qdata": q, "scale": scale, "zero_point": shift},
        {"block_size": [1, 8], "target_dtype": {"_type": "torch.dtype", "_data": f"int{bits}"}},
    )
    want = torch.empty(4, 24)
    for row in range(4):
        for column in range(24):
            group = row, column // 8
            want[row, column] = (q[row, column].float() - shift[group].float()) * scale[group].float()
    assert torch.equal(read(tmp_path, weight), want)


@pytest.mark.parametrize(
    ("shape", "block"),
    [((4, 6), [1, 6]), ((4, 6), [4, 6]), ((4, 6), []), ((4, 6), [2, 3]), ((2, 3, 8), [1, 1, 4])],
    ids=["rows", "tensor", "tensor-unsaid", "tiles", "experts"],
)
def test_float8(tmp_path: Path, shape: tuple[int, ...], block: list[int]) -> None:
    q = torch.randn(shape).to(torch.float8_e4m3fn)
    size = tuple(block) or shape
    scale = torch.rand([n // b for n, b in zip(shape, size, strict=True)]) + 0.5
    (weight,) = written(tmp_path, "Float8Tensor", {"qdata": q, "scale": scale}, {"block_size": block})
    spread = scale
    for dim, b in enumerate(size):
        spread = spread.repeat_interleave(b, dim)
    assert torch.equal(read(tmp_path, weight), q.float() * spread)


@pytest.mark.parametrize("zeros", [True, False])
def test_int4_plain(tmp_path: Path, zeros: bool) -> None:
    q, scale = torch.randint(-8, 8, (5, 16)), torch.rand(4, 5).bfloat16()
    zero = torch.zeros(4, 5).bfloat16() if zeros else torch.randn(4, 5).bfloat16()
    packed = ((q[:, 1::2] << 4) | (q[:, 0::2] & 15)).to(torch.uint8).view(torch.int8)
    (weight,) = written(
        tmp_path,
        "Int4Tensor",
        {"qdata": packed, "scale": scale, "zero_point": zero},
        {"block_size": [1, 4], "shape": [5, 16], "activation_dtype": {"_data": "float8_e4m3fn"}},
    )
    want = torch.empty(5, 16)
    for row in range(5):
        for column in range(16):
            want[row, column] = q[row, column] * scale[column // 4, row].float() + zero[column // 4, row].float()
    assert str(weight.spec) == ("i4/g4/sym" if zeros else "u4/g4/shift")
    assert weight.input is not None and weight.input.spec == "fp8_e4m3/token/dynamic"
    assert torch.equal(read(tmp_path, weight), want)


@pytest.mark.parametrize("shape", [(16, 1024), (13, 200)], ids=["whole", "padded"])
def test_int4_tiles(tmp_path: Path, shape: tuple[int, int]) -> None:
    # From the layout as documented; no GPU wrote this one.
    rows, columns, size = 16, 1024, 64
    u = torch.randint(0, 16, (rows, columns))
    pairs = torch.randn(columns // size, rows, 2).bfloat16()
    packed = torch.zeros(rows // 8, columns // 128, 32, 4, dtype=torch.int64)
    for tile, run, lane, word in torch.cartesian_prod(*(torch.arange(n) for n in packed.shape)).tolist():
        base = 128 * run + 32 * word + 2 * (lane % 4)
        logical = [base + k for k in (0, 1, 8, 9, 16, 17, 24, 25)]
        for field, place in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed[tile, run, lane, word] |= u[8 * tile + lane // 4, logical[place]] << (4 * field)
    (weight,) = written(
        tmp_path,
        "Int4TilePackedTo4dTensor",
        {"qdata": packed.to(torch.int32), "scale_and_zero": pairs},
        {"block_size": [1, size], "shape": list(shape)},
    )
    spread = pairs.float().repeat_interleave(size, 0)
    want = (u - 8) * spread[..., 0].t() + spread[..., 1].t()
    assert torch.equal(read(tmp_path, weight), want[: shape[0], : shape[1]])


INT8 = {"block_size": [1, 8]}
BY_ROW = {"act_quant_kwargs": {"_data": {"granularity": {"_type": "PerRow", "_data": {}}}}}


@pytest.mark.parametrize(
    ("kind", "dtype", "rounding"),
    [
        ("Int8Tensor", torch.int8, Rounding("i8/tensor/static", "m._weight_act_quant_scale")),
        ("Float8Tensor", torch.float8_e4m3fn, Rounding("fp8_e4m3/token/dynamic")),
    ],
)
def test_activations(tmp_path: Path, kind: str, dtype: torch.dtype, rounding: Rounding) -> None:
    tensors = {"qdata": torch.ones(4, 8).to(dtype), "scale": torch.ones(4, 1), "act_quant_scale": torch.ones(1, 1)}
    (weight,) = written(tmp_path, kind, tensors, INT8 | BY_ROW)
    assert weight.input == rounding
    assert "m._weight_act_quant_scale" in weight.tensors


BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "class": ("AffineQuantizedTensor", {}, {}, "m.weight is a torchao AffineQuantizedTensor, which is not read here"),
    "no qdata": ("Int8Tensor", {"qdata": None}, INT8, "m._weight_qdata is missing"),
    "qdata": ("Int8Tensor", {"qdata": torch.ones(4, 8)}, INT8, "m._weight_qdata is float32, not int8"),
    "scale": ("Int8Tensor", {"scale": torch.ones(3, 1)}, INT8, r"_scale is \(3, 1\); its blocks need \(4, 1\)"),
    "NaN": ("Int8Tensor", {"scale": torch.full((4, 1), math.nan)}, INT8, "m._weight_scale holds numbers that are inf"),
    "blocks": ("Int8Tensor", {}, {"block_size": [1, 3]}, r"m.weight: blocks of \(1, 3\) do not divide \(4, 8\)"),
    "block": ("Int8Tensor", {}, {"block_size": "8"}, "block_size is 8, not a list of counts"),
    "scaled": ("Int8Tensor", {"act_pre_scale": torch.ones(8)}, INT8, "act_pre_scale multiplies the input"),
    "range": ("IntxUnpackedToInt8Tensor", {"qdata": torch.full((4, 8), 9, dtype=torch.int8)},
              {**INT8, "target_dtype": "int4"}, "codes outside -8 … 7"),
    "width": ("IntxUnpackedToInt8Tensor", {}, {**INT8, "target_dtype": "int9"}, "target_dtype is 'int9'"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "data", "message"), BAD.values(), ids=BAD)
def test_errors(tmp_path: Path, kind: str, change: dict[str, Any], data: dict[str, Any], message: str) -> None:
    numbers = {"qdata": torch.ones(4, 8, dtype=torch.int8), "scale": torch.ones(4, 1)}
    tensors = {k: v for k, v in (numbers | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        (weight,) = written(tmp_path, kind, tensors, data)
        read(tmp_path, weight)


def test_a_configuration_without_quantized_tensors(tmp_path: Path) -> None:
    save_file({"m.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "torchao", "quant_type": "int4_weight_only"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"int4_weight_only, and no tensor is quantized.*qcompile\.optimize"):
        list(TorchAO().weights(open_checkpoint(tmp_path)))


def written(folder: Path, kind: str, tensors: dict[str, Tensor], data: dict[str, Any]) -> list[Stored]:
    entry = {"_type": kind, "_data": data, "_tensor_data_names": list(tensors)}
    metadata = {"m.weight": json.dumps(entry), "tensor_names": '["m.weight"]'}
    flat = {f"m._weight_{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(flat, folder / "model.safetensors", metadata=metadata)
    checkpoint = open_checkpoint(folder)
    assert TorchAO().claims(checkpoint)
    return list(TorchAO().weights(checkpoint))


def read(folder: Path, weight: Stored) -> Tensor:
    return weight.read(open_checkpoint(folder).read).dequantize()
