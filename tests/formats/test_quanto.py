"""optimum-quanto."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint, open_checkpoint
from qcompile.formats import Stored
from qcompile.formats.quanto import Quanto
from qcompile.load import load
from qcompile.quant import tensor
from qcompile.quant.activation import ActivationSpec
from qcompile.storage import packed_tensor

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("quanto-int8", torch.float32),
        ("quanto-int8-act-int8", torch.float16),
        ("quanto-int8-lmhead", torch.float16),
        ("quanto-float8", torch.float16),
    ],
)
def test_eight_bits(check: Callable, name: str, dtype: torch.dtype) -> None:
    check(name, dtype)


def test_optimized(check_optimized: Callable) -> None:
    check_optimized("quanto-int8-lmhead", torch.float16)


@pytest.mark.parametrize(("name", "dtype"), [("quanto-int4-g128", torch.float16), ("quanto-int4-bf16", torch.bfloat16)])
def test_four_bits(name: str, dtype: torch.dtype) -> None:
    # The library rounds the product and then the difference to 16 bits. Its arithmetic on our codes, scales and shifts
    # gives its numbers bit by bit; ours rounds once, so it differs by at most the rounding of the larger product.
    model = load(str(CHECKPOINTS / name), dtype=torch.float32, quantize_inputs=False, progress=False)
    compared = 0
    for path, want in load_file(CHECKPOINTS / name / "expected.safetensors").items():
        if path == "logits":
            continue
        packed, compared = packed_tensor(model.get_submodule(path.removesuffix(".weight")), "weight"), compared + 1
        assert isinstance(packed.scale, Tensor) and isinstance(packed.zero, Tensor)
        assert packed.scale.dtype == packed.zero.dtype == dtype
        groups = packed.codes().reshape(packed.scale.numel(), -1)
        product = packed.scale.reshape(-1, 1) * groups
        assert torch.equal((product + packed.zero.reshape(-1, 1)).reshape(want.shape).float(), want), path
        ulp = torch.finfo(dtype).eps * product.float().abs().reshape(want.shape)
        assert ((packed.dequantize(dtype).float() - want).abs() <= ulp + torch.finfo(dtype).eps * want.abs()).all(), (
            path
        )
    assert compared


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("piece", [1 << 24, 70], ids=["at-once", "row-by-row"])
@pytest.mark.parametrize("kind", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    ("shape", "width"), [((6, 20), 20), ((5, 192), 96), ((3, 160), 32), ((2, 256), 128), ((1, 24), 24)]
)
def test_blocks_of_rows(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    piece: int,
    kind: torch.dtype,
    shape: tuple[int, int],
    width: int,
) -> None:
    monkeypatch.setattr(tensor, "SLICE", piece)
    rows = math.prod(shape) // width
    codes, scale = torch.randint(0, 2**bits, (rows, width)), torch.rand(rows, 1) + 0.1
    shift = torch.rand(rows, 1) if kind.is_floating_point else torch.randint(0, 2**bits, (rows, 1)).to(kind)
    block = -(-rows * bits // 8)
    packed = torch.zeros(block, width, dtype=torch.uint8)
    for row in range(rows):
        packed[row % block] |= (codes[row] << bits * (row // block)).to(torch.uint8)
    tensors = {"m.weight._data._data": packed, "m.weight._scale": scale, "m.weight._shift": shift}
    checkpoint = written(tmp_path, tensors, {"weights": f"qint{bits}"}, shape)
    (weight,) = weights(checkpoint)
    want = scale * codes - shift if kind.is_floating_point else (codes - shift) * scale
    assert weight.shape == shape
    assert torch.equal(weight.read(checkpoint.read).dequantize(), want.reshape(shape))


@pytest.mark.parametrize(
    ("said", "element"),
    [("none", None), ("qint8", "i8"), ("qfloat8", "fp8_e4m3"), ("qfloat8_e5m2", "fp8_e5m2")],
)
def test_activations(tmp_path: Path, said: str, element: str | None) -> None:
    checkpoint = written(tmp_path, EIGHT, {"activations": said})
    (weight,) = weights(checkpoint)
    assert set(weight.tensors) == set(checkpoint.tensors)
    if element is None:
        assert weight.input is None and weight.output is None
        return
    assert weight.input is not None and weight.output is not None
    assert str(ActivationSpec.parse(weight.input.spec)) == f"{element}/tensor/static/native" == weight.output.spec
    assert (weight.input.scale, weight.output.scale) == ("m.input_scale", "m.output_scale")


def test_e5m2(tmp_path: Path) -> None:
    data = torch.randn(4, 8).to(torch.float8_e5m2)
    checkpoint = written(tmp_path, EIGHT | {"m.weight._data": data}, {"weights": "qfloat8_e5m2"})
    (weight,) = weights(checkpoint)
    assert torch.equal(weight.read(checkpoint.read).dequantize(), data.float() * EIGHT["m.weight._scale"])


def test_a_float_module_with_activations(tmp_path: Path) -> None:
    norm = {"n.weight": torch.ones(8), "n.input_scale": torch.ones(()), "n.output_scale": torch.ones(())}
    checkpoint = written(tmp_path, EIGHT | norm, {}, others={"n": {"activations": "qint8"}})
    with pytest.warns(UserWarning, match="the output of n, whose weight is float, is not rounded"):
        _, ignored = Quanto().weights(checkpoint)
    assert ignored.tensors == ("n.input_scale", "n.output_scale")  # type: ignore[union-attr]


EIGHT = {
    "m.weight._data": torch.randint(-128, 128, (4, 8), dtype=torch.int8),
    "m.weight._scale": torch.rand(4, 1) + 0.1,
    "m.input_scale": torch.ones(()),
    "m.output_scale": torch.ones(()),
}
FOUR = {
    "m.weight._data._data": torch.zeros(4, 32, dtype=torch.uint8),
    "m.weight._scale": torch.ones(8, 1),
    "m.weight._shift": torch.ones(8, 1),
}


@pytest.mark.parametrize(
    ("tensors", "entry", "shape", "message"),
    [
        (EIGHT | {"m.weight._scale": torch.ones(3, 1)}, {}, None, r"m.weight._scale is \(3, 1\), not \(4, 1\)"),
        (EIGHT | {"m.weight._scale": torch.full((4, 1), math.nan)}, {}, None, "m.weight._scale holds numbers that"),
        (EIGHT, {"activations": "qint3"}, None, "m has activations 'qint3'; known: none, qint8"),
        (EIGHT, "qint8", None, "m is qint8, not its types"),
        ({k: v for k, v in EIGHT.items() if "input" not in k}, {"activations": "qint8"}, None, "m.input_scale is miss"),
        (FOUR, {}, (7, 32), r"has 8 groups of 32 codes, the model's m.weight is \(7, 32\)"),
        (FOUR | {"m.weight._data._data": torch.zeros(5, 32, dtype=torch.uint8)}, {}, None, "has 5 rows; 8 rows of"),
        (FOUR | {"m.weight._shift": torch.full((8, 1), math.inf)}, {}, None, "m.weight._shift holds numbers that"),
        (FOUR | {"m.weight._shift": torch.full((8, 1), -1, dtype=torch.int8)}, {}, None, "holds negative zero points"),
    ],
)  # fmt: skip
def test_errors(tmp_path: Path, tensors: dict[str, Tensor], entry: Any, shape: Any, message: str) -> None:
    checkpoint = written(tmp_path, tensors, entry, shape)
    with pytest.raises(CheckpointError, match=message):
        (weight,) = weights(checkpoint)
        weight.read(checkpoint.read)


def test_a_configuration_without_quantized_tensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "quanto"}}')
    save_file({"m.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no weight is quantized"):
        list(Quanto().weights(open_checkpoint(tmp_path)))


def written(
    folder: Path, tensors: dict[str, Tensor], entry: Any, shape: Any = None, others: dict[str, Any] | None = None
) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    (folder / "quanto_qmap.json").write_text(json.dumps({"m": entry, **(others or {})}))
    checkpoint = open_checkpoint(folder)
    checkpoint.shapes = {"m.weight": shape} if shape else {}
    assert Quanto().claims(checkpoint)
    return checkpoint


def weights(checkpoint: Checkpoint) -> list[Stored]:
    found = list(Quanto().weights(checkpoint))
    return [entry for entry in found if isinstance(entry, Stored)]
