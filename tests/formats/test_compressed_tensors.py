"""compressed-tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.formats import _schemes
from qcompile.load import load
from qcompile.quant.activation import ActivationSpec

CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
FIXTURES = [
    "ct-fp8-block",
    "ct-fp8-dynamic",
    "ct-fp8-static-kvcache",
    "ct-int8-w4a8-int-quantized",
    "ct-int8-w8a8-dynamic",
    "ct-int8-w8a8-static",
    "ct-mixed-precision",
    "ct-mxfp4",
    "ct-naive-fp8-weightonly",
    "ct-nvfp4",
    "ct-pack-w3-g32-oldpacking",
    "ct-pack-w3-g32-sym",
    "ct-pack-w4-channel-sym",
    "ct-pack-w4-g32-actorder-group",
    "ct-pack-w4-g32-sym",
]
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name, torch.bfloat16)


def test_compiled(check_compiled: Callable) -> None:
    check_compiled("ct-fp8-block", torch.bfloat16)


def test_optimized(check_optimized: Callable) -> None:
    check_optimized("ct-pack-w4-g32-asym", torch.bfloat16)


def test_a_configuration_of_the_earliest_releases(tmp_path: Path) -> None:
    folder = shutil.copytree(CHECKPOINTS / "ct-pack-w4-g32-sym", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = {"quantization_config": config.pop("quantization_config")}
    (folder / "config.json").write_text(json.dumps(config))
    load(str(folder), progress=False)


def config(weights: dict | None = None, **group: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights or {}, **group}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def words(codes: list[int], bits: int, whole: bool) -> list[int]:
    """Codes in 32-bit words, low bits first: 32 // bits in each, or one after the other over their bounds."""
    fields = 32 // bits
    if whole:
        parts = [codes[start : start + fields] for start in range(0, len(codes), fields)]
        found = [sum(code << bits * place for place, code in enumerate(part)) for part in parts]
    else:
        number = sum(code << bits * place for place, code in enumerate(codes))
        found = [number >> 32 * word & 2**32 - 1 for word in range(-(-len(codes) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in found]


def packed(codes: Tensor, bits: int, whole: bool) -> Tensor:
    return torch.tensor([words(row, bits, whole) for row in codes.tolist()], dtype=torch.int32)


def integers(bits: int, *shape: int) -> Tensor:
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)


@pytest.mark.parametrize("zeros", ["none", "packed", "bytes"])
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(
    ("bits", "whole"), [*((bits, False) for bits in range(1, 9)), (3, True), (5, True), (6, True), (7, True)]
)
def test_packed_integers(stored_of: Callable, bits: int, whole: bool, size: int, zeros: str) -> None:
    rows, columns, half = 44, 96, 2 ** (bits - 1)
    q, zero = integers(bits, rows, columns), integers(bits, rows, columns // size)
    scale = torch.rand(rows, columns // size).bfloat16()
    tensors = {
        "a.weight_packed": packed(q + half, bits, whole),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([rows, columns]),
    }
    if zeros == "none":
        zero = torch.zeros_like(zero)
    elif zeros == "packed":
        tensors["a.weight_zero_point"] = packed((zero + half).t(), bits, whole).t()
    else:
        tensors["a.weight_zero_point"] = zero.to(torch.int8)
    stored, got = stored_of(tensors, config({"num_bits": bits}))["a.weight"]
    want = (q - zero.repeat_interleave(size, 1)).float() * scale.float().repeat_interleave(size, 1)
    assert torch.equal(got.dequantize(), want)
    assert set(stored.tensors) == set(tensors)
    assert stored.input is None


@pytest.mark.parametrize("whole", [True, False])
def test_both_packings_as_long(stored_of: Callable, whole: bool) -> None:
    q = integers(5, 8, 60)
    q[:, 6] = -1  # so that a stream has bits at the tops of words
    tensors = {
        "a.weight_packed": packed(q + 16, 5, whole),
        "a.weight_scale": torch.ones(8, 1),
        "a.weight_shape": torch.tensor([8, 60]),
    }
    assert tensors["a.weight_packed"].shape == (8, 10)
    _, got = stored_of(tensors, config({"num_bits": 5}))["a.weight"]
    assert torch.equal(got.dequantize(), q.float())


@pytest.mark.parametrize("sizes", [(32, 32, 32), (16, 48, 32), (0, 64, 32)])
def test_inputs_in_groups_of_their_own(stored_of: Callable, sizes: tuple[int, ...]) -> None:
    rows, columns = 8, 96
    q, zero, scale = integers(4, rows, columns), integers(4, rows, 3), torch.rand(rows, 3)
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    index = torch.tensor(groups, dtype=torch.int32)[torch.randperm(columns)]
    tensors = {
        "a.weight_packed": packed(q + 8, 4, True),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([rows, columns], dtype=torch.int32),
        "a.weight_zero_point": packed((zero + 8).t(), 4, True).t(),
        "a.weight_g_idx": index,
    }
    _, got = stored_of(tensors, config({"num_bits": 4, "actorder": "group"}))["a.weight"]
    want = [[(q[r, c] - zero[r, index[c]]).float() * scale[r, index[c]] for c in range(columns)] for r in range(rows)]
    assert torch.equal(got.dequantize(), torch.tensor(want))


@pytest.mark.parametrize("index", [torch.full((96,), -1), torch.arange(96) // 32])
def test_inputs_in_order_need_no_order(stored_of: Callable, index: Tensor) -> None:
    q, scale = integers(4, 8, 96), torch.rand(8, 3)
    tensors = {
        "a.weight_packed": packed(q + 8, 4, True),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([8, 96]),
        "a.weight_g_idx": index.int(),
    }
    _, got = stored_of(tensors, config({"num_bits": 4}))["a.weight"]
    assert got.order is None
    assert torch.equal(got.dequantize(), q.float() * scale.repeat_interleave(32, 1))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1,), (12, 1), (12, 2)])
@pytest.mark.parametrize("asymmetric", [True, False])
def test_integers_in_bytes(stored_of: Callable, bits: int, shape: tuple[int, ...], asymmetric: bool) -> None:
    q, zero, scale = integers(bits, 12, 64), integers(bits, *shape), torch.rand(shape).bfloat16()
    tensors = {"a.weight": q.to(torch.int8), "a.weight_scale": scale}
    if asymmetric:
        tensors["a.weight_zero_point"] = zero.to(torch.int8)
    _, got = stored_of(tensors, config({"num_bits": bits}))["a.weight"]

    def spread(side: Tensor) -> Tensor:
        return side.reshape(-1, side.shape[-1]).float().repeat_interleave(64 // side.shape[-1], 1)

    assert torch.equal(got.dequantize(), (q - spread(zero if asymmetric else zero * 0)) * spread(scale))
    assert got.spec.element.bits == bits


def test_ragged_blocks_of_floats(stored_of: Callable) -> None:
    weight, scale = torch.randn(160, 200).to(torch.float8_e4m3fn), torch.rand(2, 2).bfloat16()
    spread = scale.float().repeat_interleave(128, 0)[:160].repeat_interleave(128, 1)[:, :200]
    for block in ([128, 128], "128x128"):
        tensors = {"a.weight": weight, "a.weight_scale": scale}
        _, got = stored_of(tensors, config({"strategy": "block", "block_structure": block}))["a.weight"]
        assert torch.equal(got.dequantize(), weight.float() * spread)


def test_mx_floats_of_8_bits(stored_of: Callable) -> None:
    weight, codes = torch.randn(8, 96).to(torch.float8_e4m3fn), torch.randint(110, 130, (8, 3), dtype=torch.uint8)
    _, got = stored_of({"a.weight": weight, "a.weight_scale": codes}, config())["a.weight"]
    assert torch.equal(got.dequantize(), weight.float() * (2.0 ** (codes.float() - 127)).repeat_interleave(32, 1))
    assert str(got.spec) == "fp8_e4m3/g32/sym/scale(e8m0/tensor/sym)"


def test_floats_of_4_bits(stored_of: Callable) -> None:
    packed_pairs = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    numbers = torch.tensor([[E2M1[byte >> 4 * half & 15] for byte in row for half in (0, 1)] for row in packed_pairs])
    codes = torch.randint(0, 255, (8, 2), dtype=torch.uint8)
    _, got = stored_of({"a.weight_packed": packed_pairs, "a.weight_scale": codes}, config())["a.weight"]
    scale = torch.ldexp(torch.ones(8, 2), codes.int() - 127)
    assert torch.equal(got.dequantize(), numbers * scale.repeat_interleave(32, 1))


def test_two_levels_of_scales_divide_as_the_library_does(stored_of: Callable) -> None:
    packed_pairs = torch.randint(0, 256, (64, 512), dtype=torch.uint8)
    numbers = torch.tensor([[E2M1[byte >> 4 * half & 15] for byte in row for half in (0, 1)] for row in packed_pairs])
    local = torch.rand(64, 64).mul(448).to(torch.float8_e4m3fn)
    for most in torch.rand(20).bfloat16().float():
        tensors = {
            "a.weight_packed": packed_pairs,
            "a.weight_scale": local,
            "a.weight_global_scale": 448 * 6 / most.reshape(1),
        }
        _, got = stored_of(tensors, config())["a.weight"]
        scale = local.float() / tensors["a.weight_global_scale"]
        assert torch.equal(got.dequantize(), numbers * scale.repeat_interleave(16, 1))
    assert str(got.spec) == "fp4_e2m1/g16/sym/scale(fp8_e4m3/tensor/sym)"


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}


@pytest.mark.parametrize(
    ("args", "beside", "text"),
    [
        (None, (), None),
        (TOKEN, (), "i8/token/dynamic/half/native"),
        ({**TOKEN, "num_bits": 4}, (), "i4/token/dynamic/half/native"),
        ({**TOKEN, "strategy": "tensor"}, (), "i8/tensor/dynamic/half/native"),
        ({**TOKEN, "symmetric": False}, (), "u8/token/dynamic/native"),
        ({**TOKEN, "type": "float"}, (), "fp8_e4m3/token/dynamic/half/native"),
        ({**TOKEN, "type": "float", "strategy": "group", "group_size": 128}, (), "fp8_e4m3/g128/dynamic/half/native"),
        ({**TOKEN, "strategy": None, "dynamic": False}, ("scale",), "i8/tensor/static"),
        ({**TOKEN, "strategy": "tensor", "dynamic": False, "type": "float"}, ("scale",), "fp8_e4m3/tensor/static"),
        (
            {**TOKEN, "strategy": "tensor", "dynamic": False, "symmetric": False},
            ("scale", "zero_point"),
            "u8/tensor/static",
        ),
        (_schemes.PRESETS["NVFP4"], ("global_scale",), "fp4_e2m1/g16/dynamic/scale(fp8_e4m3)"),
        (_schemes.PRESETS["MXFP4"], (), "fp4_e2m1/g32/dynamic/scale(e8m0)"),
        (_schemes.PRESETS["MXFP8"], (), "fp8_e4m3/g32/dynamic/scale(e8m0)"),
    ],
)
def test_rounded_activations(stored_of: Callable, args: dict | None, beside: tuple, text: str | None) -> None:
    tensors = {"a.weight": torch.zeros(8, 32, dtype=torch.int8), "a.weight_scale": torch.ones(8, 1)}
    for kind in beside:
        for side in ("input", "output"):
            value = torch.zeros(1, dtype=torch.int8) if kind == "zero_point" else torch.ones(1)
            tensors[f"a.{side}_{kind}"] = value
    stored, _ = stored_of(tensors, config(input_activations=args, output_activations=args))["a.weight"]
    assert set(stored.tensors) == set(tensors)
    for side, rounding in (("input", stored.input), ("output", stored.output)):
        if text is None:
            assert rounding is None
        else:
            assert rounding is not None
            assert str(ActivationSpec.parse(rounding.spec)) == rounding.spec == text
            names = (f"a.{side}_{beside[0]}" if beside else None, f"a.{side}_zero_point" if beside[1:] else None)
            assert (rounding.scale, rounding.zero) == names


def test_targets_by_name_then_by_expression_then_by_class() -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 2}},
        "group_1": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 3}},
        "group_2": {"targets": ["m.1.down_proj"], "weights": {"num_bits": 4}},
    }
    found = _schemes.schemes({"config_groups": groups})
    paths = ("m.0.up_proj", "m.0.down_proj", "m.1.down_proj")
    assert [_schemes.scheme(found, path)["weights"]["num_bits"] for path in paths] == [2, 3, 4]


@pytest.mark.parametrize(
    ("name", "bits", "text"),
    [
        ("W4A16", 4, None),
        ("w4a16_asym", 4, None),
        ("W3A8", 3, "i8/token/dynamic/half/native"),
        ("W8A8", 8, "i8/token/dynamic/half/native"),
        ("INT8", 8, "i8/token/dynamic/half/native"),
        ("W4A4", 4, "i4/token/dynamic/half/native"),
        ("W4AFP8", 4, "fp8_e4m3/token/dynamic/half/native"),
    ],
)
def test_schemes_by_name(stored_of: Callable, name: str, bits: int, text: str | None) -> None:
    q = integers(bits, 8, 128)
    tensors = {
        "a.weight_packed": packed(q + 2 ** (bits - 1), bits, False),
        "a.weight_scale": torch.ones(8, 1),
        "a.weight_shape": torch.tensor([8, 128]),
    }
    stored, got = stored_of(tensors, {"config_groups": {name: ["Linear"]}})["a.weight"]
    assert torch.equal(got.dequantize(), q.float())
    assert (stored.input.spec if stored.input else None) == text


def test_blocks_of_a_scheme_by_name(stored_of: Callable) -> None:
    tensors = {"a.weight": torch.zeros(130, 256).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(2, 2)}
    stored, _ = stored_of(tensors, {"config_groups": {"FP8_BLOCK": ["Linear"]}})["a.weight"]
    assert str(stored.spec) == "fp8_e4m3/b128x128/sym"
    assert stored.input is not None
    assert stored.input.spec == "fp8_e4m3/g128/dynamic/half/native"


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse, stored as sparse-24-bitmask"),
        ({}, {"format": "marlin-24"}, "sparse, stored as marlin-24"),
        ({"a.bitmask": torch.zeros(1)}, {}, "a.weight is sparse, stored with a bitmask"),
        ({}, {"transform_config": {"config_groups": {"R1": {}}}}, "does not rotate activations"),
        ({}, {"config_groups": {"W9A9": ["Linear"]}}, "unknown scheme 'W9A9'; known"),
        ({}, {"config_groups": {}}, "a: the configuration says num_bits None, not 1 to 8"),
        ({}, {"config_groups": {"g": {"targets": ["re:("]}}}, "'re:\\(' is no regular expression"),
        (
            {"b.weight": torch.ones(2, 2), "b.weight_scale": torch.ones(1)},
            {},
            "b.weight has scales and is",
        ),
        ({"b.weight": torch.ones(2, 2, dtype=torch.int8)}, {}, "b.weight_scale is missing"),
        ({"b.weight": torch.ones(2, 2).to(torch.float8_e5m2)}, {}, "b.weight_scale is missing"),
        ({"a.weight_shape": None}, {}, "a.weight_shape is missing"),
        ({"a.weight_shape": torch.tensor([9, 64])}, {}, r"a.weight_shape says \[9, 64\]; a.weight_packed has 8 rows"),
        (
            {"a.weight_shape": torch.tensor([8, 99])},
            {},
            r"a.weight_packed is \(8, 8\); 99 codes of 4 bits are 13",
        ),
        ({"a.weight_scale": torch.ones(8, 3)}, {}, r"a.weight_scale is \(8, 3\), which for a weight of \(8, 64\)"),
        ({"a.weight_scale": torch.full((8, 2), torch.inf)}, {}, "a.weight_scale holds numbers that are infinite"),
        ({"a.weight_scale": torch.ones(8, 2).byte()}, {}, "a.weight_scale is uint8, not"),
        ({"a.weight_zero_point": torch.ones(3, 2).int()}, {}, r"a.weight_zero_point is int32 \(3, 2\); needs int8"),
        (
            {"a.weight_zero_point": torch.full((8, 2), 8).char()},
            {},
            "a.weight_zero_point holds numbers outside",
        ),
        ({"a.weight_g_idx": torch.full((64,), 2).int()}, {}, "a.weight_g_idx has values beyond the 2 groups"),
        ({"a.weight_g_idx": torch.ones(63).int()}, {}, r"a.weight_g_idx is \(63,\), not \(64,\)"),
        ({"a.weight_packed": torch.ones(8, 8)}, {}, "a.weight_packed is float32, not"),
        (
            {"b.weight": torch.full((2, 2), 9).char(), "b.weight_scale": torch.ones(1)},
            {},
            "b.weight holds numbers outside the 4 bits",
        ),
        (
            {"b.weight_packed": torch.ones(2, 16).byte(), "b.weight_scale": torch.ones(2, 2).to(torch.float8_e4m3fn)},
            {},
            "b.weight_global_scale is missing",
        ),
        (
            {
                "b.weight_packed": torch.ones(2, 16).byte(),
                "b.weight_scale": torch.ones(2, 2).to(torch.float8_e4m3fn),
                "b.weight_global_scale": torch.zeros(1),
            },
            {},
            r"b.weight_global_scale is \[0.0\], not one number to divide by",
        ),
    ],
)
def test_contradictions_are_named(stored_of: Callable, change: dict, more: dict, message: str) -> None:
    tensors = {
        "a.weight_packed": packed(integers(4, 8, 64) + 8, 4, True),
        "a.weight_scale": torch.ones(8, 2),
        "a.weight_shape": torch.tensor([8, 64]),
        **change,
    }
    with pytest.raises(CheckpointError, match=message):
        stored_of({name: t for name, t in tensors.items() if t is not None}, {**config({"num_bits": 4}), **more})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({**TOKEN, "dynamic": False}, "a: inputs by token have static scales"),
        ({**TOKEN, "dynamic": False, "strategy": "tensor"}, "a.input_scale is missing"),
        ({**TOKEN, "strategy": "attn_head"}, "a: inputs share scales by attn_head"),
        ({**TOKEN, "strategy": "tensor_group", "dynamic": "local"}, "a.input_global_scale is missing"),
    ],
)
def test_inputs_that_cannot_be_rounded_are_named(stored_of: Callable, args: dict, message: str) -> None:
    tensors = {"a.weight": torch.zeros(8, 32, dtype=torch.int8), "a.weight_scale": torch.ones(8, 1)}
    with pytest.raises(CheckpointError, match=message):
        stored_of(tensors, config(input_activations=args))
