"""How a checkpoint wants activations rounded before (or after) they are multiplied by a quantized weight."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompile.errors import SpecError


@dataclass(frozen=True)
class ActivationElement:
    """The numbers that activations are rounded to: integers from `low` to `high`, or floats of 1 + … + `mantissa` bits
    whose exponents start at `exponent`, up to ± `high`."""

    tag: str
    low: float
    high: float
    mantissa: int | None = None
    exponent: int = 0

    @property
    def middle(self) -> float:
        """What libraries take off unsigned codes: theirs are signed, and sums with their zero points are rounded."""
        return (self.high + 1) / 2

    def nearest(self, y: Tensor) -> Tensor:
        """float32 rounded to these numbers, ties to even; what lies outside goes to the ends."""
        y = y.clamp(self.low, self.high)
        if self.mantissa is None:
            return torch.round(y)
        step = _power_of_two(y).clamp(min=2.0**self.exponent) * 2.0**-self.mantissa
        return torch.round(y / step) * step


ELEMENTS = {
    element.tag: element
    for element in (
        ActivationElement("i8", -128, 127),
        ActivationElement("i4", -8, 7),
        ActivationElement("u8", 0, 255),
        ActivationElement("u4", 0, 15),
        ActivationElement("fp8_e4m3", -448, 448, mantissa=3, exponent=-6),
        ActivationElement("fp8_e5m2", -57344, 57344, mantissa=2, exponent=-14),
        ActivationElement("fp6_e2m3", -7.5, 7.5, mantissa=3),
        ActivationElement("fp6_e3m2", -28, 28, mantissa=2, exponent=-2),
        ActivationElement("fp4_e2m1", -6, 6, mantissa=1),
    )
}
SCALES = ("fp8_e4m3", "e8m0")
CODES = {"i8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class ActivationSpec:
    """`x' = (code - zero) * scale` with `code = round(x / scale + zero)` kept in range; u8 and u4 have zero points.

    Spelled `element/granularity/when` and options, for example `i8/token/dynamic` or `i8/token/dynamic/half`.

    granularity  who shares a scale: token (the last dimension), tensor, or g<n>, n neighbours in a token
    static       whether scale and zero point come from the checkpoint; else from the values that share them: a scale is
                 their largest magnitude by the largest number, that of u8 is their range, zero included, by 255
    half         divide by half the range of codes, 127.5 for i8, and round the scale to the dtype of x (torchao)
    native       round scales, quotients and all between to the dtype of x (compressed-tensors and Quark)
    ceiling      `max(1200.0)`: magnitudes count as at most this (fbgemm)
    floor        `min(1e-05)`: they count as at least this (BitNet)
    outliers     `outliers(6.0)`: columns with a value of this magnitude in any row stay as they are, and such values
                 count for no scale (LLM.int8, arXiv:2208.07339; so a row depends on the others in its batch)
    scale        `scale(fp8_e4m3)`: dynamic scales are rounded to that against a static one (NVFP4), or to powers of
                 two, `scale(e8m0)` (OCP MX)
    """

    element: ActivationElement
    granularity: str
    static: bool
    half: bool = False
    native: bool = False
    ceiling: float | None = None
    floor: float | None = None
    outliers: float | None = None
    scale: str | None = None

    def __post_init__(self) -> None:
        options = [option for option in str(self).split("/")[3:] if option != "native"]
        if self.static and (options or self.granularity != "tensor"):
            raise SpecError(
                f"{self}: a static scale is one for all, without options but native: {self.element.tag}/tensor/static"
            )
        if self.scale and (self.scale not in SCALES or self.group is None or self.element.mantissa is None):
            raise SpecError(f"{self}: rounded scales, {' or '.join(SCALES)}, belong to groups of floats")
        if self.outliers is not None and (self.granularity != "token" or self.is_asymmetric):
            raise SpecError(f"{self}: outliers are set apart from symmetric codes by token")
        if self.is_asymmetric and options:
            raise SpecError(f"{self}: {self.element.tag} takes no option but native")

    def __str__(self) -> str:
        options = {"max": self.ceiling, "min": self.floor, "outliers": self.outliers, "scale": self.scale}
        parts = [self.element.tag, self.granularity, "static" if self.static else "dynamic"]
        parts += [option for option in ("half", "native") if getattr(self, option)]
        return "/".join(parts + [f"{name}({value})" for name, value in options.items() if value is not None])

    @staticmethod
    def parse(text: str) -> ActivationSpec:
        """The spec that `text` spells; SpecError says which part is wrong."""
        return _parse(text)

    @property
    def group(self) -> int | None:
        return int(self.granularity[1:]) if self.granularity[0] == "g" else None

    @property
    def is_asymmetric(self) -> bool:
        return self.element.low == 0

    @property
    def needs_scale(self) -> bool:
        """Whether a scale comes with it: a static one, or the one that dynamic fp8 scales are relative to."""
        return self.static or self.scale == "fp8_e4m3"

    @property
    def needs_zero(self) -> bool:
        return self.static and self.is_asymmetric


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> ActivationSpec:
    tag, granularity, when, *options = [*text.split("/"), "", ""]
    options = options[:-2]
    if tag not in ELEMENTS:
        raise SpecError(f"{text!r}: unknown element {tag!r}; known: {', '.join(ELEMENTS)}")
    if not re.fullmatch(r"token|tensor|g[1-9]\d{0,8}", granularity, re.ASCII):
        raise SpecError(f"{text!r}: unknown granularity {granularity!r}; known: token, tensor, g<inputs> such as g128")
    if when not in ("static", "dynamic"):
        raise SpecError(f"{text!r}: scales are static or dynamic, not {when!r}")
    found: dict[str, float | str | bool] = {}
    names = {"max": "ceiling", "min": "floor", "outliers": "outliers"}
    for option in options:
        name, _, value = option.removesuffix(")").partition("(")
        if option in ("half", "native"):
            found[option] = True
        elif name == "scale":
            found["scale"] = value
        elif name in names and re.fullmatch(r"\d[\d.]*(e-?\d+)?", value, re.ASCII):
            found[names[name]] = float(value)
        else:
            known = "half, native, max(<number>), min(<number>), outliers(<number>), scale(<element>)"
            raise SpecError(f"{text!r}: unknown option {option!r}; known: {known}")
    spec = ActivationSpec(ELEMENTS[tag], granularity, when == "static", **found)  # type: ignore[arg-type]
    if str(spec) != text:
        raise SpecError(f"{text!r} is spelled {str(spec)!r}")
    return spec


def round_activation(x: Tensor, scale: Tensor | None, zero: Tensor | None, spec: ActivationSpec) -> Tensor:
    """x quantized and dequantized, computed in float32 and rounded once to the dtype of x.

    scale, zero   one number each where they are static, else None; `scale` is also what dynamic fp8 scales are relative
                  to: the largest of them, 448, stands for 448 / scale
    """
    values, columns, dtype = x.to(torch.float32), x.shape[-1], x.dtype
    if spec.group:
        values = F.pad(values, (0, -columns % spec.group)).unflatten(-1, (-1, spec.group))
    if spec.is_asymmetric:
        step, shift = _asymmetric_scale(values, dtype, scale, zero, spec)
        middle = spec.element.middle
        signed = _native(_quotient(values, step, dtype, spec) + (shift - middle), dtype, spec)
        codes = spec.element.nearest(signed + middle)
        rounded = (codes - shift) * step
    else:
        step = _scale(values, dtype, scale, spec)
        rounded = spec.element.nearest(_quotient(values, step, dtype, spec)) * step
    if spec.outliers is not None:
        kept = (values.abs() >= spec.outliers).reshape(-1, columns).any(0)
        rounded = torch.where(kept, values, rounded)
    if spec.group:
        rounded = rounded.flatten(-2).narrow(-1, 0, columns)
    return rounded.to(dtype).contiguous()


def activation_codes(x: Tensor, scale: Tensor | None, spec: ActivationSpec) -> tuple[Tensor, Tensor]:
    """The codes of x (…, n), by token or tensor, as a dtype that torch multiplies, int8 or float8_e4m3fn; and the
    float32 scale of each token (…, 1) or of all ()."""
    values = x.to(torch.float32)
    step = _scale(values, x.dtype, scale, spec)
    return spec.element.nearest(_quotient(values, step, x.dtype, spec)).to(CODES[spec.element.tag]), step


def _quotient(values: Tensor, step: Tensor, dtype: torch.dtype, spec: ActivationSpec) -> Tensor:
    return _native(values / step, dtype, spec)


def _scale(values: Tensor, dtype: torch.dtype, given: Tensor | None, spec: ActivationSpec) -> Tensor:
    """The scale of symmetric codes; `given` is the static one, or what dynamic ones are relative to."""
    if spec.static and given is not None:
        return given.to(torch.float32)
    magnitudes = values.abs()
    if spec.outliers is not None:
        magnitudes = magnitudes.masked_fill(magnitudes >= spec.outliers, 0)
    largest = magnitudes.amax() if spec.granularity == "tensor" else magnitudes.amax(-1, keepdim=True)
    if spec.ceiling is not None or spec.floor is not None:
        largest = largest.clamp(spec.floor, spec.ceiling)
    if spec.scale == "e8m0":
        step = _shared_power(largest, spec.element)
    else:
        step = largest / ((spec.element.high - spec.element.low) / 2 if spec.half else spec.element.high)
    if spec.scale == "fp8_e4m3" and given is not None:
        factor = given.to(torch.float32)
        step = ELEMENTS["fp8_e4m3"].nearest(step * factor) / factor
    step = _rounded(step, dtype) if spec.half else _native(step, dtype, spec)
    # Zeros stay zeros, whatever they are divided by.
    return step.masked_fill(step == 0, 1)


def _asymmetric_scale(
    values: Tensor, dtype: torch.dtype, scale: Tensor | None, zero: Tensor | None, spec: ActivationSpec
) -> tuple[Tensor, Tensor]:
    if scale is not None and zero is not None:
        return scale.to(torch.float32), zero.to(torch.float32)
    if spec.granularity == "tensor":
        least, most = values.amin(), values.amax()
    else:
        least, most = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    least, most = least.clamp(max=0), most.clamp(min=0)
    step = _native(_native(most - least, dtype, spec) / spec.element.high, dtype, spec)
    step = step.masked_fill(step == 0, 1)
    middle = spec.element.middle
    shift = torch.round(_native(-middle - _native(least / step, dtype, spec), dtype, spec)) + middle
    return step, shift.clamp(0, spec.element.high)


def _native(numbers: Tensor, dtype: torch.dtype, spec: ActivationSpec) -> Tensor:
    return _rounded(numbers, dtype) if spec.native else numbers


def _rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 that holds what `dtype` can. Not by conversion: a compiler leaves out a conversion there and back."""
    return _FLOATS[dtype].nearest(numbers) if dtype in _FLOATS else numbers


# As far as exponents go whose last bits float32 holds as normal numbers.
_FLOATS = {
    torch.bfloat16: ActivationElement("bf16", -(2.0**127) * 1.9921875, 2.0**127 * 1.9921875, mantissa=7, exponent=-119),
    torch.float16: ActivationElement("f16", -65504, 65504, mantissa=10, exponent=-14),
}


def _power_of_two(y: Tensor) -> Tensor:
    """The power of two at or below the magnitude of each float32: its exponent bits alone."""
    return (y.view(torch.int32) & 0x7F800000).view(torch.float32)


def _shared_power(largest: Tensor, element: ActivationElement) -> Tensor:
    """The scale of an MX group: the power of two that brings its largest magnitude, rounded to the element's mantissa,
    into the element's top binade (compressed-tensors and Quark; the former takes one bit of mantissa for fp8 too)."""
    assert element.mantissa is not None
    mantissa = 1 if element.tag.startswith("fp8") else element.mantissa
    bumped = (largest.view(torch.int32) + (1 << (22 - mantissa))).view(torch.float32)
    top = 2.0 ** (math.frexp(element.high)[1] - 1)
    return (_power_of_two(bumped) / top).clamp(min=2.0**-126)
