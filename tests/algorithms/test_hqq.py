import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.algorithms import hqq, rtn
from qcompile.errors import SpecError, UnsupportedError
from qcompile.quant.spec import QSpec

BITS = {"u8": 8, "u6": 6, "u5": 5, "u4": 4, "u3": 3, "u2": 2, "ternary": 1.58, "u1": 1}
SIDES = {
    "plain": ("", {}),
    "zero": ("/zero(u8/tensor/asym)", {"quant_zero": True}),
    "scale": ("/scale(u8/o128/asym)", {"quant_scale": True}),
    "both": ("/scale(u8/o128/asym)/zero(u8/tensor/asym)", {"quant_zero": True, "quant_scale": True}),
}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def theirs(weight: Tensor, **options: Any) -> Tensor:
    """The dequantized weight of hqq's own layer, in float32. `pack=False` where it cannot pack the number of rows."""
    quantize = pytest.importorskip("hqq.core.quantize")
    pack, changes = options.pop("pack", True), options.pop("changes", {})
    with redirect_stdout(io.StringIO()), threads(1):
        config = quantize.hqq_base_quant_config(**options)
        config["weight_quant_params"] |= {"bitpack": pack, **changes}
        layer = quantize.HQQLinear(None, config, compute_dtype=torch.float32, device="cpu", initialize=False)
        # Built from a linear, hqq 0.2.8 ignores quantized scales; this is what older releases did.
        layer.quantize(weight.clone(), **{key: value for key, value in config.items() if key != "offload_meta"})
        return layer.dequantize()


def ours(weight: Tensor, spec: str) -> Tensor:
    return hqq.quantize(weight, QSpec.parse(spec)).dequantize()


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("element", BITS)
def test_equals_hqq_bit_for_bit(element: str, axis: int, sides: str) -> None:
    weight = torch.randn(64, 128) * 0.03
    suffix, options = SIDES[sides]
    want = theirs(weight, nbits=BITS[element], group_size=64, axis=axis, **options)
    assert torch.equal(ours(weight, f"{element}/{'og'[axis]}64/asym{suffix}"), want)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((515, 192), 8),  # several slices, the last one odd
        ((387, 192), 64),
        ((40, 24), 320),  # groups over several rows
        ((1001, 72), 8),  # a number of elements that vector loops do not divide
        ((7, 24), 8),
        ((2048, 64), 64),
    ],
)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("element", ["u4", "u3"])
def test_equals_hqq_in_slices(element: str, axis: int, shape: tuple[int, int], size: int) -> None:
    weight = torch.randn(shape)
    want = theirs(weight, nbits=BITS[element], group_size=size, axis=axis, pack=False)
    assert torch.equal(ours(weight, f"{element}/{'og'[axis]}{size}/asym"), want)


@pytest.mark.parametrize("element", ["u4", "u2"])
def test_equals_hqq_by_row_and_by_tensor(element: str) -> None:
    weight = torch.randn(96, 160)
    row = theirs(weight, nbits=BITS[element], group_size=None, axis=1)
    assert torch.equal(ours(weight, f"{element}/row/asym"), row)
    tensor = theirs(weight, nbits=BITS[element], group_size=None, axis=1, changes={"channel_wise": False})
    assert torch.equal(ours(weight, f"{element}/tensor/asym"), tensor)


@pytest.mark.parametrize("spec", ["u4/g64/asym", "u3/o64/asym"])
def test_same_bytes_on_any_number_of_threads(spec: str) -> None:
    weight = torch.randn(1000, 384)
    results = []
    for count in (1, 2, 8, 1):
        with threads(count):
            results.append(hqq.quantize(weight, QSpec.parse(spec)))
            assert torch.get_num_threads() == count
    for result in results[1:]:
        for part in ("data", "scale", "zero"):
            assert torch.equal(getattr(result, part), getattr(results[0], part))


def test_threads_are_given_back_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("hqq.core.optimize.optimize_weights_proximal_legacy_step", fails)
    with threads(3), pytest.raises(MemoryError):
        hqq.quantize(torch.randn(8, 64), QSpec.parse("u4/g64/asym"))
    with threads(3):
        with pytest.raises(MemoryError):
            hqq.quantize(torch.randn(2048, 64), QSpec.parse("u4/g64/asym"))
        assert torch.get_num_threads() == 3


def sqnr(weight: Tensor, dequantized: Tensor) -> float:
    noise = weight.double() - dequantized.double()
    return float(10 * torch.log10(weight.double().square().sum() / noise.square().sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("element", BITS)
def test_not_worse_than_round_to_nearest(element: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 256) * 0.02).to(dtype)
    spec = QSpec.parse(f"{element}/g64/asym")
    assert sqnr(weight, ours(weight, str(spec))) > sqnr(weight, rtn.quantize(weight, spec).dequantize()) - 0.05


@pytest.mark.parametrize("suffix", [suffix for suffix, _ in SIDES.values()])
def test_scales_of_16_bits_cost_little(suffix: str) -> None:
    weight = (torch.randn(128, 512) * 0.02).bfloat16()
    exact = sqnr(weight, ours(weight.float(), f"u4/g64/asym{suffix}"))
    assert sqnr(weight, ours(weight, f"u4/g64/asym{suffix}")) > exact - 0.02


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("u7/g64/asym", "u7/g64/asym: HQQ knows 1 to 6 and 8 bits, not 7; the algorithm rtn takes it"),
        ("i4/g64/sym", "i4/g64/sym: HQQ has float zero points (asym), not sym; the algorithm rtn takes it"),
        ("u4/g64/asym_int", "HQQ has float zero points (asym), not asym_int; the algorithm rtn takes it"),
        ("u4/g64/asym/scale(i8/tensor/sym)", "HQQ has float zero points (asym), not sym"),
        ("u4/g64/asym/zero(u7/tensor/asym)", "HQQ knows 1 to 6 and 8 bits, not 7"),
    ],
)
def test_specs_that_hqq_has_not(spec: str, reason: str) -> None:
    with pytest.raises(SpecError, match=re.escape(reason)):
        hqq.quantize(torch.randn(8, 64), QSpec.parse(spec))


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hqq.core.optimize", None)
    with pytest.raises(UnsupportedError, match=r"takes its solver from the package hqq .* choose the algorithm rtn"):
        hqq.quantize(torch.randn(8, 64), QSpec.parse("u4/g64/asym"))


@pytest.mark.filterwarnings("error")
def test_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    hqq.quantize(torch.randn(8, 64), QSpec.parse("u4/g64/asym/scale(u8/o8/asym)"))
    assert capfd.readouterr() == ("", "")
