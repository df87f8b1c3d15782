"""compressed-tensors. What transformers and the package make of the file is asked where that is installed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.files.checkpoint import open_checkpoint
from qcompile.load import load
from qcompile.quant.spec import QSpec
from qcompile.quant.tensor import QTensor
from qcompile.writers import ActivationRounding, Contents, Weight
from qcompile.writers.compressed_tensors import CompressedTensors

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
PACKED = [f"{kind}{bits}/g32/{zero}" for bits in range(2, 9) for kind, zero in (("i", "sym"), ("u", "asym_int"))]
FORMATS = {
    **dict.fromkeys([*PACKED, "i4/row/sym", "u4/row/asym_int", "i8/tensor/sym", "ternary/g64/sym"], "pack-quantized"),
    **dict.fromkeys(["fp8_e4m3/row/sym", "fp8_e4m3/tensor/sym", "fp8_e4m3/b48x32/sym"], "naive-quantized"),
    "fp8_e4m3/g16/sym": "naive-quantized",
}


@pytest.mark.parametrize(("spec", "format"), FORMATS.items())
def test_round_trip(packed: Callable, resaved: Callable, tmp_path: Path, spec: str, format: str) -> None:
    resaved(packed(spec, dtype=torch.bfloat16, num_hidden_layers=1), "compressed-tensors")
    said = open_checkpoint(tmp_path / "one").quantization
    assert said["format"] == format and said["ignore"] == ["lm_head"]


def small_floats(spec: str, rows: int = 32, columns: int = 64) -> QTensor:
    """Random codes under random scales that are codes themselves."""
    parsed = QSpec.parse(spec)
    codes = torch.randint(0, 2**parsed.element.bits - 1, (rows, columns), dtype=torch.uint8)
    codes[codes == 127] = 0  # of 8 bits no number
    groups = parsed.scale_shape(rows, columns)
    inner, unit = parsed.scale_spec, torch.tensor([[1 / 3]], dtype=torch.float64)
    low, high = (1, 120) if "e4m3" in str(inner) else (100, 140)
    scale = QTensor.from_codes(inner, torch.randint(low, high, groups, dtype=torch.uint8), unit, None)
    if "e8m0" in str(inner):
        scale = replace(scale, scale=torch.ones(1, 1))
    return QTensor.from_codes(parsed, codes, scale, None)


@pytest.mark.parametrize(
    ("spec", "format"),
    [
        ("fp4_e2m1/g16/sym/scale(fp8_e4m3/tensor/sym)", "nvfp4-pack-quantized"),
        ("fp4_e2m1/g32/sym/scale(e8m0/tensor/sym)", "mxfp4-pack-quantized"),
        ("fp8_e4m3/g32/sym/scale(e8m0/tensor/sym)", "mxfp8-quantized"),
        ("fp8_e4m3/b32x32/sym/scale(e8m0/tensor/sym)", "naive-quantized"),
    ],
)
def test_small_floats(tmp_path: Path, spec: str, format: str) -> None:
    given = Weight("m.weight", small_floats(spec), torch.bfloat16)
    assert CompressedTensors().refuses(given) is None
    CompressedTensors().write(Contents({}, [given]), tmp_path, 1 << 30)
    (stored,) = [entry for entry in read(tmp_path) if entry.path == "m.weight"]
    assert open_checkpoint(tmp_path).quantization["format"] == format
    assert torch.equal(stored.read(open_checkpoint(tmp_path).read).dequantize(), given.tensor.dequantize())


def read(folder: Path) -> list:
    from qcompile.formats import Stored, find

    checkpoint = open_checkpoint(folder)
    method = find(checkpoint)
    assert method is not None
    return [entry for entry in method.weights(checkpoint) if isinstance(entry, Stored)]


ROUNDINGS = [
    ("i8/row/sym", "i8/token/dynamic/half/native", False, "int-quantized"),
    ("i4/g32/sym", "i8/token/dynamic/half/native", False, "int-quantized"),
    ("u4/row/asym_int", "u8/token/dynamic/native", False, "int-quantized"),
    ("i8/row/sym", "i8/tensor/static", True, "int-quantized"),
    ("i8/row/sym", "u8/tensor/static", True, "int-quantized"),
    ("fp8_e4m3/row/sym", "fp8_e4m3/token/dynamic/half/native", False, "float-quantized"),
    ("fp8_e4m3/tensor/sym", "fp8_e4m3/tensor/static", True, "float-quantized"),
    ("fp8_e4m3/b32x32/sym", "fp8_e4m3/g32/dynamic/half/native", False, "float-quantized"),
]


@pytest.mark.parametrize(("spec", "rounding", "static", "format"), ROUNDINGS)
def test_rounded_inputs(weight: Callable, tmp_path: Path, spec: str, rounding: str, static: bool, format: str) -> None:
    zero = torch.tensor(200, dtype=torch.uint8) if rounding.startswith("u8") and static else None
    given = ActivationRounding(rounding, torch.tensor(0.125) if static else None, zero)
    made = weight(spec, dtype=torch.float32, input=given)
    assert CompressedTensors().refuses(made) is None
    CompressedTensors().write(Contents({}, [made]), tmp_path, 1 << 30)
    (stored,), checkpoint = read(tmp_path), open_checkpoint(tmp_path)
    assert checkpoint.quantization["format"] == format
    assert stored.input.spec == rounding
    assert torch.equal(stored.read(checkpoint.read).dequantize(), made.tensor.dequantize())
    if zero is not None:
        assert checkpoint.read(stored.input.zero).item() == 200 - 128  # read back as 200 by load()


def test_groups_of_the_configuration(packed: Callable, resaved: Callable, tmp_path: Path) -> None:
    resaved(packed("i4/g32/sym", down_proj="fp8_e4m3/row/sym", v_proj=None), "compressed-tensors")
    said = open_checkpoint(tmp_path / "one").quantization
    assert said["format"] == "mixed-precision"
    first, second = said["config_groups"].values()
    assert (first["format"], second["format"]) == ("pack-quantized", "naive-quantized")
    assert second["targets"] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert set(said["ignore"]) == {"lm_head", *(f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1))}


@pytest.mark.parametrize(
    ("spec", "fields", "reason"),
    [
        ("u4/g32/asym", {}, "its zero points are floats, such as"),
        ("fp8_e5m2/row/sym", {}, "fp8_e5m2 codes are not integers"),
        ("fp4_e2m1/g32/sym", {}, "groups of 32 with powers of two"),
        ("i4/g32/sym", {"kind": "embedding"}, "the embedding stays dense"),
        (
            "i4/g32/sym",
            {"output": ActivationRounding("i8/token/dynamic")},
            "its outputs are rounded as i8/token/dynamic",
        ),
        ("i8/row/sym", {"input": ActivationRounding("i8/token/dynamic")}, "i8/token/dynamic, which it cannot say"),
        ("i8/row/sym", {"input": ActivationRounding("i8/token/dynamic/outliers(6.0)")}, "which it cannot say"),
    ],
)
def test_refusals(weight: Callable, spec: str, fields: dict, reason: str) -> None:
    assert reason in (CompressedTensors().refuses(weight(spec, **fields)) or "")


def test_act_order(tmp_path: Path) -> None:
    model = load(str(CHECKPOINTS / "gptq-v1-b4-g32-actorder"), progress=False)
    with pytest.raises(qcompile.QCompileError, match=r"not of neighbouring inputs \(act-order\); gptq holds them"):
        qcompile.save(model, tmp_path, format="compressed-tensors")


PEERS = ["i4/g32/sym", "i3/g32/sym", "i8/row/sym", "fp8_e4m3/row/sym", "fp8_e4m3/b32x32/sym", "fp8_e4m3/tensor/sym"]


@pytest.mark.parametrize("spec", PEERS)
def test_transformers_reads_it(packed: Callable, tmp_path: Path, spec: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = packed(spec, dtype=torch.bfloat16, o_proj="i6/row/sym", v_proj=None)
    qcompile.save(model, tmp_path / "saved", format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert off(theirs(ids).logits, model(ids).logits) < 0.01


@pytest.mark.parametrize("name", ["ct-int8-w8a8-static", "ct-int8-w4a8-int-quantized", "ct-nvfp4", "ct-mxfp4"])
def test_transformers_rounds_inputs_alike(tmp_path: Path, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    model = load(str(CHECKPOINTS / name), dtype=torch.bfloat16, progress=False)
    qcompile.save(model, tmp_path / "saved", format="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert off(theirs(ids).logits, model(ids).logits) < 0.01


@pytest.mark.parametrize("spec", ["u4/g32/asym_int", "u3/row/asym_int"])
def test_the_package_unpacks_zero_points(weight: Callable, tensors_of: Callable, tmp_path: Path, spec: str) -> None:
    """By its own function: transformers 5.23 gives packed zero points no room."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import unpack_from_int32

    given = weight(spec, 48, 64)
    tensors = tensors_of(CompressedTensors(), given)
    bits, groups = given.spec.element.bits, given.tensor.zero.shape
    middle = 2 ** (bits - 1)
    zeros = unpack_from_int32(tensors["weight_zero_point"], bits, torch.Size(groups), packed_dim=0)
    codes = unpack_from_int32(tensors["weight_packed"], bits, torch.Size((48, 64)))
    assert torch.equal(zeros.int() + middle, given.tensor.zero.int())
    assert torch.equal(codes.int() + middle, given.tensor.codes().int())


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the Euclidean norm; both are computed in 16 bits."""
    return float((got.float() - want.float()).norm() / want.float().norm())
