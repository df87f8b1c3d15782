import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import QCompileError, SpecError
from qcompile.quant.activation import ELEMENTS, ActivationSpec, round_activation

TEXTS = [
    "i8/token/dynamic",
    "i8/token/dynamic/half",
    "i8/tensor/dynamic/half",
    "i8/g16/dynamic/half",
    "i4/token/dynamic",
    "i8/token/dynamic/min(1e-05)",
    "i8/token/dynamic/outliers(6.0)",
    "u8/token/dynamic",
    "u8/tensor/dynamic",
    "u8/g16/dynamic",
    "fp8_e4m3/token/dynamic",
    "fp8_e4m3/token/dynamic/max(1200.0)",
    "fp8_e5m2/tensor/dynamic",
    "fp8_e4m3/g128/dynamic",
    "fp4_e2m1/g16/dynamic/scale(fp8_e4m3)",
    "fp4_e2m1/g32/dynamic/scale(e8m0)",
    "fp6_e2m3/g32/dynamic/scale(e8m0)",
    "fp8_e4m3/g32/dynamic/scale(e8m0)",
    "i8/tensor/static",
    "u8/tensor/static",
    "fp8_e4m3/tensor/static",
    "fp8_e4m3/tensor/static/native",
    "i8/token/dynamic/half/native",
    "u8/g16/dynamic/native",
    "fp8_e4m3/token/dynamic/native",
]


@pytest.mark.parametrize("text", TEXTS)
def test_spelling_parses_back(text: str) -> None:
    assert str(ActivationSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("i8/token", "static or dynamic, not ''"),
        ("i9/token/dynamic", "unknown element 'i9'"),
        ("i8/row/dynamic", "unknown granularity 'row'"),
        ("i8/g0/dynamic", "unknown granularity 'g0'"),
        ("i8/token/dynamic/fast", "unknown option 'fast'"),
        ("i8/token/dynamic/max(x)", "unknown option 'max"),
        ("i8/token/dynamic/outliers(6)", "is spelled 'i8/token/dynamic/outliers.6.0.'"),
        ("i8/token/static", "a static scale is one for all"),
        ("i8/tensor/static/half", "a static scale is one for all"),
        ("i8/g32/dynamic/scale(e8m0)", "belong to groups of floats"),
        ("fp4_e2m1/g32/dynamic/scale(fp16)", "belong to groups of floats"),
        ("i8/tensor/dynamic/outliers(6.0)", "by token"),
        ("u8/token/dynamic/half", "takes no option but native"),
    ],
)
def test_what_is_no_spec(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        ActivationSpec.parse(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text("i8u4fp_e3m2/tokensrdyamichlfg()0.169x", max_size=40))
def test_any_text_parses_or_is_a_spec_error(text: str) -> None:
    with contextlib.suppress(QCompileError):
        assert str(ActivationSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("tag", "dtype", "largest"), [("fp8_e4m3", torch.float8_e4m3fn, 448), ("fp8_e5m2", torch.float8_e5m2, 57344)]
)
def test_floats_round_as_torch_casts(tag: str, dtype: torch.dtype, largest: float) -> None:
    y = torch.randn(10_000) * 2.0 ** torch.randint(-20, 18, (10_000,))
    y = torch.cat([y, torch.arange(256, dtype=torch.uint8).view(dtype).float().nan_to_num(0)])
    want = y.clamp(-largest, largest).to(dtype).float()
    assert torch.equal(ELEMENTS[tag].nearest(y), want)


def test_small_floats_round_to_the_nearest_and_ties_to_even() -> None:
    y = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 9.0, -0.8])
    assert ELEMENTS["fp4_e2m1"].nearest(y).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, -1]
    assert ELEMENTS["fp6_e3m2"].nearest(torch.tensor([27.0, 40.0, 0.03, 0.04])).tolist() == [28, 28, 0, 0.0625]
    assert ELEMENTS["fp6_e2m3"].nearest(torch.tensor([7.4, 0.06, 0.19])).tolist() == [7.5, 0, 0.25]


def nearest_number(value: float, tag: str) -> float:
    """By trying every number; where two are as near, the one with the even code."""
    if tag[0] != "f":
        element = ELEMENTS[tag]
        return min(max(round(value), int(element.low)), int(element.high))
    tables = {"fp4_e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6]}
    dtype = torch.float8_e4m3fn
    codes = tables.get(tag) or torch.arange(127, dtype=torch.uint8).view(dtype).float().tolist()
    code = min(range(len(codes)), key=lambda i: (abs(codes[i] - abs(value)), i % 2))
    return math.copysign(codes[code], value)


def f32(value: float) -> float:
    """Scales and quotients are float32: the largest magnitude by a scale of `half` is a tie but for this rounding."""
    return torch.tensor(value).item()


def by_hand(row: list[float], text: str) -> list[float]:
    """One set of values that share a scale, in plain loops."""
    tag, _, _, *options = text.split("/")
    outliers = 6.0 if "outliers(6.0)" in options else math.inf
    if tag == "u8":
        low, high = min(0, *row), max(0, *row)
        scale = f32((high - low) / 255) or 1
        zero = round(-low / scale)
        return [(min(max(round(f32(v / scale)) + zero, 0), 255) - zero) * scale for v in row]
    largest = max([abs(v) for v in row if abs(v) < outliers], default=0)
    largest = min(max(largest, 1e-5 if "min(1e-05)" in options else 0), 1200 if "max(1200.0)" in options else math.inf)
    top = {"i8": 127, "i4": 7, "fp8_e4m3": 448, "fp4_e2m1": 6}[tag]
    scale = f32(largest / (top + 0.5 if "half" in options else top)) or 1
    if "scale(e8m0)" in options:
        exponent = math.floor(math.log2(largest))
        exponent += largest / 2**exponent >= 1.75
        scale = 2.0 ** (exponent - int(math.log2(top)))
    return [v if abs(v) >= outliers else nearest_number(f32(v / scale), tag) * scale for v in row]


@pytest.mark.parametrize(
    "text", [t for t in TEXTS if "dynamic" in t and not any(no in t for no in ("(fp8", "e5m2", "fp6"))]
)
def test_values(text: str) -> None:
    x = torch.randn(2, 3, 64) * torch.tensor([0.01, 3.0, 2000.0 if "max" in text else 1.0])[:, None]
    x[0, 1] = 0.3
    spec = ActivationSpec.parse(text)
    got = round_activation(x, None, None, spec)
    if "outliers" in text:
        kept = (x.abs() >= 6).flatten(0, 1).any(0)
        assert 0 < kept.sum() < 64
        assert torch.equal(got[..., kept], x[..., kept])
    if spec.granularity == "tensor":
        want = torch.tensor(by_hand(x.flatten().tolist(), text)).reshape(x.shape)
    else:
        rows = x.reshape(-1, 64 if spec.group is None else min(spec.group, 64)).tolist()
        want = torch.tensor([by_hand(row, text) for row in rows]).reshape(x.shape)
    if "outliers" in text:
        want = torch.where(kept, x, want)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_scales_of_fp8_against_a_static_one() -> None:
    x = torch.randn(4, 32)
    factor = 448 * 6 / x.abs().max()
    got = round_activation(x, factor, None, ActivationSpec.parse("fp4_e2m1/g16/dynamic/scale(fp8_e4m3)"))
    for group, rounded in zip(x.reshape(-1, 16), got.reshape(-1, 16), strict=True):
        scale = nearest_number(float(group.abs().max() / 6 * factor), "fp8_e4m3") / float(factor)
        want = [nearest_number(v / scale, "fp4_e2m1") * scale for v in group.tolist()]
        torch.testing.assert_close(rounded, torch.tensor(want))


def test_static() -> None:
    x = torch.tensor([[0.2, -0.3, 9.0, -9.0]])
    half = torch.tensor(0.05)
    got = round_activation(x, half, None, ActivationSpec.parse("i8/tensor/static"))
    torch.testing.assert_close(got, torch.tensor([[0.2, -0.3, 6.35, -6.4]]))
    zero = torch.tensor(100, dtype=torch.uint8)
    got = round_activation(x, half, zero, ActivationSpec.parse("u8/tensor/static"))
    torch.testing.assert_close(got, torch.tensor([[0.2, -0.3, 7.75, -5.0]]))


@pytest.mark.parametrize("text", [t for t in TEXTS if "dynamic" in t])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_odd_widths_and_dtypes(text: str, dtype: torch.dtype) -> None:
    spec = ActivationSpec.parse(text)
    relative = torch.tensor(100.0) if spec.needs_scale else None
    assert not round_activation(torch.zeros(2, 48, dtype=dtype), relative, None, spec).any()
    x = torch.randn(3, 45, dtype=dtype)
    got = round_activation(x, relative, None, spec)
    assert got.dtype == dtype and got.shape == x.shape
    step = 0.3 if spec.element.high < 8 else 0.1
    assert (got - x).abs().max() <= step * x.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_native_is_arithmetic_of_the_dtype_of_x(dtype: torch.dtype) -> None:
    x = (torch.randn(50, 64) * 10).to(dtype)
    got = round_activation(x, None, None, ActivationSpec.parse("i8/token/dynamic/half/native"))
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    assert torch.equal(got, torch.clamp(torch.round(x / scale), -128, 127) * scale)

    got = round_activation(x, None, None, ActivationSpec.parse("fp8_e4m3/tensor/dynamic/native"))
    scale = x.abs().amax() / 448
    assert torch.equal(got, (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype) * scale)

    got = round_activation(x, None, None, ActivationSpec.parse("u8/token/dynamic/native"))
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (most - least) / 255
    zero = torch.round(-128 - least / scale)
    assert torch.equal(got, (torch.round(x / scale + zero).clamp(-128, 127) - zero) * scale)


def test_scales_with_half_are_of_the_dtype_of_x() -> None:
    x = torch.randn(5, 64).to(torch.bfloat16)
    got = round_activation(x, None, None, ActivationSpec.parse("i8/token/dynamic/half"))
    scale = (x.abs().amax(-1, keepdim=True) / 127.5).to(torch.bfloat16).float()
    assert torch.equal(got, ((x.float() / scale).round().clamp(-128, 127) * scale).to(torch.bfloat16))
