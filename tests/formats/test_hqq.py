"""hqq. The packer here restates the layout in plain loops."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qcompile
from qcompile.errors import CheckpointError
from qcompile.files.checkpoint import Checkpoint, open_checkpoint
from qcompile.formats.hqq import Hqq
from qcompile.quant.tensor import QTensor

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
INPUT_IDS = torch.tensor([[1, 5, 9, 42, 7, 3, 100, 200]])
FIXTURES = [
    ("hqq-b2-g16-axis1", torch.float16),
    ("hqq-b3-g64-axis0", torch.float16),
    ("hqq-b4-float-view-bf16", torch.bfloat16),
    ("hqq-b4-g64-axis1", torch.float16),
    ("hqq-dynamic", torch.float16),
    ("hqq-native-pt", torch.float16),
]
NAMES = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
SPECS = {5: 8, 6: 8, 1.58: 2}


def read(checkpoint: Checkpoint) -> dict[str, QTensor]:
    assert Hqq().claims(checkpoint)
    read = {weight.path: weight.read(checkpoint.read) for weight in Hqq().weights(checkpoint)}
    return {path: part for path, part in read.items() if isinstance(part, QTensor)}


@pytest.mark.parametrize(("name", "dtype"), FIXTURES)
def test_weights_and_logits(name: str, dtype: torch.dtype) -> None:
    expected = load_file(CHECKPOINTS / name / "expected.safetensors")
    for path, weight in read(open_checkpoint(CHECKPOINTS / name)).items():
        # hqq rounds code - zero to 16 bits, and then the product.
        scale, zero = (weight.spec.granularity.spread(side, *weight.shape) for side in (weight.scale, weight.zero))
        twice = (weight.codes().to(dtype) - zero) * scale
        assert torch.equal(twice.float(), expected[path]), path
        # One rounding is within an ulp of each of those, where code - zero is at most as large as the codes.
        ulp = torch.finfo(dtype).eps * float(expected[path].abs().max() + weight.scale.max())
        torch.testing.assert_close(weight.dequantize(), expected[path], rtol=0, atol=ulp)
    model = qcompile.load(str(CHECKPOINTS / name), dtype=torch.float32, progress=False)
    logits = model(INPUT_IDS).logits
    assert (logits - expected["logits"]).norm() / expected["logits"].norm() < (1e-3 if dtype == torch.float16 else 1e-2)


@pytest.mark.parametrize("name", ["hqq-b3-g64-axis0", "hqq-native-pt"])
def test_compiled(name: str) -> None:
    model = qcompile.load(str(CHECKPOINTS / name), dtype=torch.float32, progress=False)
    logits = model(INPUT_IDS).logits
    compiled = qcompile.optimize(model, progress=False)(INPUT_IDS).logits
    assert (compiled - logits).norm() / logits.norm() < 1e-5


def packed(codes: list[int], height: int, bits: int) -> Tensor:
    """The words of a flat matrix of so many rows: as many blocks of rows as codes in a word, the first one on top."""
    width = len(codes) // height
    count = 10 if bits == 3 else 8 // bits
    block = math.ceil(height / count)
    words = [[0] * width for _ in range(block)]
    for place, code in enumerate(codes):
        row, column = divmod(place, width)
        words[row % block][column] |= code << bits * (count - 1 - row // block)
    return torch.tensor(words, dtype=torch.int32 if bits == 3 else torch.uint8)


def drawn(nbits: float, axis: int, size: int | None, out: int, columns: int) -> tuple[dict[str, Any], Tensor]:
    """What hqq keeps of a module, and its weight in float64."""
    draw, numel = random.Random(columns), out * columns
    g = size or (columns if axis == 1 else out)
    groups = numel // g
    codes = [draw.randrange(round(2**nbits)) for _ in range(numel)]
    scale, zero = torch.rand(groups).half() + 0.5, torch.rand(groups).half() * 2**nbits
    weight = torch.zeros(numel, dtype=torch.float64)
    for place, code in enumerate(codes):
        group = place // g if axis == 1 else place % groups
        weight[place] = (code - float(zero[group])) * float(scale[group])
    bits = SPECS.get(nbits, nbits)
    form = (groups, 1) if axis == 1 else (1, groups)
    module = {
        "W_q": packed(codes, groups if axis == 1 else g, int(bits)),
        **{"scale": scale.reshape(form), "zero": zero.reshape(form), "nbits": nbits, "group_size": size},
        **{"shape": torch.Size([out, columns]), "axis": axis, "packing": NAMES[int(bits)], "view_as_float": False},
        **{"unpack_view_dtype": torch.int32 if bits == 3 else torch.uint8, "compute_dtype": torch.float16},
    }
    return module, weight.reshape(out, columns)


def as_tensors(module: dict[str, Any]) -> dict[str, Tensor]:
    """The transformers form."""
    tensors = {}
    for key, value in module.items():
        if key == "shape" and value is not None:
            value = torch.tensor(list(value))
        elif isinstance(value, str | torch.dtype):
            value = torch.tensor(list(str(value).encode()), dtype=torch.uint8)
        elif isinstance(value, bool):
            value = torch.tensor(int(value), dtype=torch.uint8)
        elif isinstance(value, int):
            value = torch.tensor(value, dtype=torch.int32)
        elif isinstance(value, float):
            value = torch.tensor(value, dtype=torch.float32)
        if value is not None:
            tensors[f"m.{key}"] = value
    return tensors


def same(got: dict[str, QTensor], want: Tensor, spec: str) -> None:
    assert str(got["m.weight"].spec) == spec
    assert torch.equal(got["m.weight"].dequantize(torch.float64), want)


@pytest.mark.parametrize("nbits", [1, 1.58, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [8, 16, 64, 240])
def test_bits_axes_and_sizes(weights_of: Callable, nbits: float, axis: int, size: int) -> None:
    """Groups of 240 go over the ends of rows."""
    module, weight = drawn(nbits, axis, size, 40, 96)
    got = weights_of(as_tensors(module), {"quant_method": "hqq"})
    same(got, weight, f"u{math.ceil(nbits)}/{'og'[axis]}{size}/asym")


@pytest.mark.parametrize(("axis", "tag"), [(0, "o64"), (1, "row")])
def test_group_size_none(weights_of: Callable, axis: int, tag: str) -> None:
    module, weight = drawn(4, axis, None, 64, 48)
    same(weights_of(as_tensors(module), {"quant_method": "hqq"}), weight, f"u4/{tag}/asym")


@pytest.mark.parametrize("view", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_words_under_the_dtype_of_a_float(weights_of: Callable, view: torch.dtype, nbits: int) -> None:
    module, weight = drawn(nbits, 1, 16, 40, 96)
    module |= {"W_q": module["W_q"].view(view), "view_as_float": True}
    same(weights_of(as_tensors(module), {"quant_method": "hqq"}), weight, f"u{nbits}/g16/asym")


def test_slices_of_rows_across_blocks(weights_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.quant.tensor.SLICE", 7 * 96)
    module, weight = drawn(3, 0, 16, 40, 96)
    same(weights_of(as_tensors(module), {"quant_method": "hqq"}), weight, "u3/o16/asym")


def native(folder: Path, state: dict[str, Any]) -> dict[str, QTensor]:
    torch.save(state, folder / "qmodel.pt")
    (folder / "config.json").write_text("{}")
    return read(open_checkpoint(folder))


@pytest.mark.parametrize("nested", [False, True])
def test_native_form(tmp_path: Path, nested: bool) -> None:
    module, weight = drawn(4, 1, 16, 40, 96)
    codes = module.pop("W_q")
    if nested:  # older files, without some of the values
        del module["unpack_view_dtype"], module["view_as_float"], module["packing"]
    state = {"W_q": codes, "bias": None, "meta": module} if nested else {"W_q": codes, **module}
    same(native(tmp_path, {"m": state, "norm": {"weight": torch.ones(2)}}), weight, "u4/g16/asym")


def byte_codes(side: Tensor, size: int | None) -> tuple[Tensor, dict[str, Any], Tensor]:
    """Scales or zero points as 8-bit codes, in groups along axis 0 or per tensor, and what they are then."""
    flat = side.flatten()
    groups = len(flat) // size if size else 1
    step, low = (torch.rand(1, groups) / 100 + 0.001).half(), torch.rand(1, groups).half() * 10
    codes = torch.arange(len(flat)) * 7 % 251
    owner = torch.arange(len(flat)) % groups
    numbers = (codes.double() - low.double()[0, owner]) * step.double()[0, owner]
    form = (size, -1) if size else tuple(side.shape)
    meta = {"nbits": 8, "group_size": size, "shape": side.shape, "axis": 0, "packing": "8bit_u8"}
    meta |= {"scale": step if size else step[0, 0], "zero": low if size else low[0, 0], "view_as_float": False}
    return codes.to(torch.uint8).reshape(form), meta, numbers.reshape(side.shape)


@pytest.mark.parametrize("axis", [0, 1])
def test_quantized_scales_and_zero_points(tmp_path: Path, axis: int) -> None:
    module, weight = drawn(4, axis, 16, 64, 96)
    plain_zero, plain_scale = module.pop("zero").double(), module.pop("scale").double()
    module["zero_q"], module["meta_zero"], zero = byte_codes(plain_zero, None)
    module["scale_q"], module["meta_scale"], scale = byte_codes(plain_scale, 128)
    groups = (64 * 96 // 16, 16) if axis == 1 else (16, 64 * 96 // 16)
    want = ((weight.reshape(groups) / plain_scale + plain_zero).round() - zero) * scale
    codes = module.pop("W_q")
    got = native(tmp_path, {"m": {"W_q": codes, "bias": None, "meta": module}})
    assert str(got["m.weight"].spec) == f"u4/{'og'[axis]}16/asym/scale(u8/o128/asym)/zero(u8/tensor/asym)"
    torch.testing.assert_close(got["m.weight"].dequantize(torch.float64), want.reshape(64, 96), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quantized", [False, True])
def test_scales_and_zero_points_in_one_tensor(tmp_path: Path, quantized: bool) -> None:
    module, weight = drawn(2, 1, 16, 64, 96)
    scale, zero, codes = module.pop("scale"), module.pop("zero"), module.pop("W_q")
    if quantized:
        zero_q, module["meta_zero"], new_zero = byte_codes(zero, 128)
        scale_q, module["meta_scale"], new_scale = byte_codes(scale, 128)
        module["zero_scale"] = torch.stack((zero_q, scale_q))
        weight = ((weight.reshape(-1, 16) / scale.double() + zero.double()).round() - new_zero) * new_scale
    else:
        module["zero_scale"] = torch.stack((zero, scale))
    got = native(tmp_path, {"m": {"W_q": codes, "bias": None, "meta": module}})["m.weight"]
    torch.testing.assert_close(got.dequantize(torch.float64), weight.reshape(64, 96), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scale": None}, r"m\.scale is missing"),
        ({"zero": None}, r"m\.zero is missing"),
        ({"shape": None}, r"m\.shape is None, not two counts"),
        ({"shape": (96,)}, r"m\.shape is \[96\], not two counts"),
        ({"shape": (41, 96)}, r"m\.W_q is torch\.uint8 of \(120, 16\).* is 1968 words"),
        ({"axis": 2}, "axis 2.* are not HQQ's"),
        ({"axis": 1.0}, r"axis 1\.0 are not HQQ's"),
        ({"nbits": "4"}, "nbits 4.* are not HQQ's"),
        ({"nbits": torch.ones(3)}, r"nbits \[1.0, 1.0, 1.0\].* are not HQQ's"),
        ({"nbits": torch.ones(300)}, r"m\.nbits is \(300,\); it describes"),
        ({"packing": 4}, "packing 4.* are not HQQ's"),
        ({"packing": "2bit_u8"}, "packing 2bit_u8.* are not HQQ's"),
        ({"nbits": 7}, r"m: nbits 7.* are not HQQ's"),
        ({"packing": "5bit_u8"}, "packing 5bit_u8.* are not HQQ's"),
        ({"group_size": 0}, "in groups of 0 does not give"),
        ({"group_size": 7}, "in groups of 7 does not give"),
        ({"W_q": torch.zeros(3, 16, dtype=torch.uint8)}, r"m\.W_q is torch\.uint8 of \(3, 16\).* is 1920 words"),
        ({"W_q": torch.zeros(120, 16, dtype=torch.int16)}, r"m\.W_q is torch\.int16"),
        ({"scale": torch.ones(3, 1)}, r"m\.scale is torch\.float32 of \(3, 1\); these groups need \(40, 6\)"),
        ({"scale": torch.ones(240, 1, dtype=torch.int32)}, r"m\.scale is torch\.int32"),
        ({"zero": torch.full((240, 1), math.nan)}, r"m\.zero holds numbers that are infinite or NaN"),
    ],
)
def test_bad_tensors(weights_of: Callable, changed: dict[str, Any], message: str) -> None:
    module, _ = drawn(4, 1, 16, 40, 96)
    with pytest.raises(CheckpointError, match=message):
        weights_of(as_tensors({**module, **changed}), {"quant_method": "hqq"})


def test_codes_beyond_their_bits(weights_of: Callable) -> None:
    module, _ = drawn(5, 1, 16, 40, 96)
    module["W_q"][3, 3] = 32
    with pytest.raises(CheckpointError, match=r"m\.W_q has codes beyond 5 bits"):
        weights_of(as_tensors(module), {"quant_method": "hqq"})


def test_no_codes(weights_of: Callable) -> None:
    with pytest.raises(CheckpointError, match="by its configuration, and has no W_q"):
        weights_of({"m.weight": torch.ones(2)}, {"quant_method": "hqq"})
