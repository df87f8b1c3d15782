"""quark."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.errors import CheckpointError
from qcompile.quant.activation import ActivationSpec

FIXTURES = [
    "quark-fp4-pergroup",
    "quark-fp8-kvcache",
    "quark-fp8-perchannel-dynamic",
    "quark-fp8-pertensor-static",
    "quark-int4-perchannel",
    "quark-int4-pergroup",
    "quark-int8-pergroup",
    "quark-int8-pertensor-static",
    "quark-mxfp4",
    "quark-mxfp6-e2m3",
]
ORDERS = {"reorder": (0, 2, 4, 6, 1, 3, 5, 7), "order": (0, 1, 2, 3, 4, 5, 6, 7)}
RANGES = {"int4": (-8, 8), "uint4": (0, 16), "int8": (-128, 128), "uint8": (0, 256)}
DTYPES = {"int8": torch.int8, "uint8": torch.uint8}


@pytest.mark.parametrize("name", FIXTURES)
def test_weights_and_logits(check: Callable, name: str) -> None:
    check(name)


def test_optimized(check_optimized: Callable) -> None:
    check_optimized("quark-uint4-pergroup")


def config(weight: Any, method: str = "reorder", **more: Any) -> dict[str, Any]:
    own = {"weight": weight, **more}
    return {"quant_method": "quark", "global_quant_config": own, "export": {"pack_method": method}}


def packed(codes: Tensor, tag: str, method: str) -> Tensor:
    """Codes as they lie in the file, along the last dimension: field i of a word holds the code ORDERS[method][i]."""
    if tag in DTYPES:
        return codes.to(DTYPES[tag])
    if codes.dim() == 0:
        return codes.int() & 15
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    word = sum((padded[..., place].long() & 15) << 4 * field for field, place in enumerate(ORDERS[method]))
    assert isinstance(word, Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).int()


@pytest.mark.parametrize("method", ["reorder", "order"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tag", ["int4", "uint4", "int8", "uint8"])
@pytest.mark.parametrize("scheme", ["per_group", "per_channel", "per_tensor", "before 1.0"])
def test_integers(
    stored_of: Callable, scheme: str, tag: str, symmetric: bool, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompile.quant.tensor.SLICE", 64 * 5)  # slices of rows that begin within a word
    rows, columns, size = 20, 64, 32
    grouped = scheme in ("per_group", "before 1.0")
    shape = (rows, columns // size) if grouped else (rows,) if scheme == "per_channel" else ()
    q, zero, scale = torch.randint(*RANGES[tag], (rows, columns)), torch.randint(*RANGES[tag], shape), torch.rand(shape)
    zero = torch.zeros_like(zero) if symmetric else zero
    method = "reorder" if scheme == "before 1.0" else method
    tensors = {
        "a.weight": packed(q.t() if grouped else q, tag, method),
        "a.weight_scale": scale.t() if scheme == "per_group" else scale,
        "a.weight_zero_point": packed(zero.t() if grouped else zero, tag, method),
    }
    says = config({"dtype": tag, "symmetric": symmetric, "qscheme": scheme}, method)
    if scheme == "before 1.0":
        del says["export"]
    stored, got = stored_of(tensors, says)["a.weight"]

    def spread(side: Tensor) -> Tensor:
        return side.repeat_interleave(size, 1) if grouped else side[:, None] if side.dim() else side

    assert torch.equal(got.dequantize(), (q - spread(zero)).float() * spread(scale))
    assert set(stored.tensors) == set(tensors)
    assert (got.zero is None) == (symmetric and tag.startswith("int"))


def test_float_zero_points(stored_of: Callable) -> None:
    q, zero, scale = torch.randint(0, 16, (24, 64)), torch.rand(24, 2) * 15, torch.rand(24, 2)
    tensors = {
        "a.weight": packed(q.t(), "uint4", "reorder"),
        "a.weight_scale": scale.t(),
        "a.weight_zero_point": zero.t(),
    }
    _, got = stored_of(tensors, config({"dtype": "uint4", "symmetric": False}))["a.weight"]
    want = (q - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    assert torch.equal(got.dequantize(), want)


@pytest.mark.parametrize("shape", [(), (1,), (8,)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_8_bits(stored_of: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, scale = torch.randn(8, 32).to(dtype), torch.rand(shape).bfloat16()
    _, got = stored_of({"a.weight": weight, "a.weight_scale": scale}, config({"dtype": "fp8_e4m3"}))["a.weight"]
    assert torch.equal(got.dequantize(), weight.float() * scale.float().reshape(-1, 1))


@pytest.mark.parametrize(("tag", "exponent", "mantissa"), [("fp6_e2m3", 2, 3), ("fp6_e3m2", 3, 2), ("fp4", 2, 1)])
@pytest.mark.parametrize("powers", [True, False])
def test_small_floats(stored_of: Callable, tag: str, exponent: int, mantissa: int, powers: bool) -> None:
    bits = 1 + exponent + mantissa
    codes = torch.randint(0, 2**bits, (8, 64))

    def number(code: int) -> float:
        sign, power, fraction = code >> bits - 1, code >> mantissa & 2**exponent - 1, code & 2**mantissa - 1
        bias = 2 ** (exponent - 1) - 1
        magnitude = (
            2.0 ** (power - bias) * (1 + fraction / 2**mantissa) if power else 2.0 ** (1 - bias - mantissa) * fraction
        )
        return -magnitude if sign else magnitude

    def row_bytes(row: list[int]) -> list[int]:
        stream = sum(code << bits * place for place, code in enumerate(row))
        return list(stream.to_bytes(len(row) * bits // 8, "little"))

    weight = torch.tensor([row_bytes(row) for row in codes.tolist()], dtype=torch.uint8)
    scale = torch.randint(110, 130, (8, 2), dtype=torch.uint8) if powers else torch.rand(8, 2).bfloat16()
    factor = torch.ldexp(torch.ones(8, 2), scale.int() - 127) if powers else scale.float()
    numbers = torch.tensor([[number(code) for code in row] for row in codes.tolist()])
    _, got = stored_of({"a.weight": weight, "a.weight_scale": scale}, config({"dtype": tag}))["a.weight"]
    assert torch.equal(got.dequantize(), numbers * factor.repeat_interleave(32, 1))


def test_modules_of_their_own(stored_of: Callable) -> None:
    """Names go before classes, classes before the rest; what is excluded has no scale."""
    four, eight = torch.randint(-8, 8, (8, 8)), torch.randint(-128, 128, (8, 8))
    tensors = {
        "m.up_proj.weight": packed(four, "int4", "reorder"),
        "m.down_proj.weight": packed(eight, "int8", "reorder"),
        "m.gate.weight": torch.randn(8, 8),
        **{f"m.{name}.weight_scale": torch.ones(()) for name in ("up_proj", "down_proj")},
    }
    says = config({"dtype": "fp4"})
    says["layer_type_quant_config"] = {"Linear": {"weight": {"dtype": "int4", "symmetric": True}}}
    says["layer_quant_config"] = {"*.down_proj": {"weight": {"dtype": "int8", "symmetric": True}}}
    found = stored_of(tensors, {**says, "exclude": ["*.gate"]})
    assert set(found) == {"m.up_proj.weight", "m.down_proj.weight"}
    assert torch.equal(found["m.up_proj.weight"][1].dequantize(), four.float())
    assert torch.equal(found["m.down_proj.weight"][1].dequantize(), eight.float())


GROUP = {"qscheme": "per_group", "group_size": 32, "is_dynamic": True, "scale_format": "e8m0"}


@pytest.mark.parametrize(
    ("says", "beside", "text"),
    [
        (None, (), None),
        ({"dtype": "int8", "qscheme": "per_tensor", "symmetric": True}, ("scale", "zero_point"), "i8/tensor/static"),
        ({"dtype": "uint8", "qscheme": "per_tensor", "symmetric": False}, ("scale", "zero_point"), "u8/tensor/static"),
        (
            {"dtype": "fp8_e4m3", "qscheme": "per_tensor", "symmetric": True},
            ("scale",),
            "fp8_e4m3/tensor/static/native",
        ),
        ({"dtype": "fp8_e4m3", "qscheme": "per_channel", "is_dynamic": True}, (), "fp8_e4m3/token/dynamic/half/native"),
        ({"dtype": "int8", "qscheme": "per_token", "is_dynamic": True}, (), "i8/token/dynamic/half"),
        ({"dtype": "int8", "qscheme": "per_tensor", "is_dynamic": True}, (), "i8/tensor/dynamic/half"),
        ({"dtype": "int8", "qscheme": "per_token", "symmetric": False, "is_dynamic": True}, (), "u8/token/dynamic"),
        ({"dtype": "fp4", **GROUP}, (), "fp4_e2m1/g32/dynamic/scale(e8m0)"),
        ({"dtype": "fp6_e2m3", **GROUP}, (), "fp6_e2m3/g32/dynamic/scale(e8m0)"),
    ],
)
def test_rounded_activations(stored_of: Callable, says: dict | None, beside: tuple, text: str | None) -> None:
    tensors = {"a.weight": torch.zeros(8, 32).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}
    for kind in beside:
        for side in ("input", "output"):
            tensors[f"a.{side}_{kind}"] = torch.zeros((), dtype=torch.int8) if kind == "zero_point" else torch.ones(())
    stored, _ = stored_of(tensors, config({"dtype": "fp8_e4m3"}, input_tensors=says, output_tensors=says))["a.weight"]
    assert set(stored.tensors) == set(tensors)
    for side, rounding in (("input", stored.input), ("output", stored.output)):
        if text is None:
            assert rounding is None
        else:
            assert rounding is not None
            assert str(ActivationSpec.parse(rounding.spec)) == rounding.spec == text
            assert rounding.scale == (f"a.{side}_scale" if beside else None)


def test_outputs_that_a_cache_holds_are_not_rounded(stored_of: Callable) -> None:
    tensors = {
        "a.k_proj.weight": torch.zeros(8, 32).to(torch.float8_e4m3fn),
        "a.k_proj.weight_scale": torch.ones(()),
        "a.k_proj.output_scale": torch.ones(()),
    }
    spec = {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}
    says = config(spec, output_tensors=spec)
    stored, _ = stored_of(tensors, {**says, "kv_cache_quant_config": {"*k_proj": {"output_tensors": spec}}})[
        "a.k_proj.weight"
    ]
    assert stored.output is None
    assert set(stored.tensors) == set(tensors)


@pytest.mark.parametrize(
    ("change", "weight", "message"),
    [
        ({"a.weight_scale": None}, {}, "a.weight_scale is missing"),
        ({"a.weight": torch.randn(8, 8)}, {}, "a.weight has scales and is torch.float32, not packed"),
        ({}, {"dtype": "int3"}, r"a.weight is torch.int32, by the configuration 'int3'; known: int4"),
        ({}, [{}, {}], "a.weight is quantized in 2 stages"),
        ({}, {"dtype": "int8"}, "a.weight is int32, not int8 or uint8|a.weight is int32, not uint8 or int8"),
        ({}, {"dtype": "fp4"}, "a.weight is int32, not uint8"),
        ({"a.weight": torch.zeros(8, 31).byte()}, {"dtype": "fp6_e2m3"}, "31 bytes are no whole number of 6 bits"),
        ({"a.weight_scale": torch.ones(3, 16)}, {}, r"a.weight_scale is \(3, 16\); a.weight of \(64, 2\), by group"),
        ({"a.weight_scale": torch.full((2, 16), torch.nan)}, {}, "a.weight_scale holds numbers that are infinite"),
        (
            {"a.weight_zero_point": torch.zeros(1, 2).int()},
            {},
            r"a.weight_zero_point is \(1, 2\); 16 outputs have 2 groups",
        ),
        (
            {"a.weight_zero_point": torch.ones(2, 2).int()},
            {"symmetric": True},
            "a.weight_zero_point is not 0 everywhere",
        ),
        ({"a.weight_zero_point": torch.zeros(2, 16)}, {}, "a.weight_zero_point is torch.float32; signed integers"),
    ],
)
def test_contradictions_are_named(stored_of: Callable, change: dict, weight: Any, message: str) -> None:
    tensors = {
        "a.weight": torch.zeros(64, 2, dtype=torch.int32),
        "a.weight_scale": torch.ones(2, 16),
        "a.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32),
        **change,
    }
    says = weight if isinstance(weight, list) else {"dtype": "int4", "symmetric": False, **weight}
    with pytest.raises(CheckpointError, match=message):
        stored_of({name: tensor for name, tensor in tensors.items() if tensor is not None}, config(says))


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ([{}, {}], "a: inputs are quantized in 2 stages"),
        ({"dtype": "int8", "qscheme": "per_tensor"}, "a.input_scale is missing"),
        ({"dtype": "int8", "qscheme": "per_moon", "is_dynamic": True}, "a: inputs share scales 'per_moon'; known"),
    ],
)
def test_inputs_that_cannot_be_rounded_are_named(stored_of: Callable, says: Any, message: str) -> None:
    tensors = {"a.weight": torch.zeros(8, 32).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(())}
    with pytest.raises(CheckpointError, match=message):
        stored_of(tensors, config({"dtype": "fp8_e4m3"}, input_tensors=says))


def test_an_unknown_order_is_named(stored_of: Callable) -> None:
    tensors = {"a.weight": torch.zeros(8, 8, dtype=torch.int32), "a.weight_scale": torch.ones(())}
    with pytest.raises(CheckpointError, match="pack_method is 'shuffle', neither reorder nor order"):
        stored_of(tensors, config({"dtype": "int4", "symmetric": True}, "shuffle"))
