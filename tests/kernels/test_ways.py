"""Ways and tiles to measure: the formula's is among them, all fit the device, and none is one that would be wrong."""

from dataclasses import replace

import pytest
import torch

from qcompile.kernels import _gluon
from qcompile.kernels._tuning import Device, DotTile, FewTile, MmaTile
from qcompile.kernels._turns import WgmmaTile
from qcompile.kernels._ways import Choice, Product, by_formula, candidates, fits, product_of, tile_of

H100 = Device()
# GeForce 4090 and T4.
ADA, TURING = Device(8, 99 << 10, 128), Device(7, 64 << 10, 40)
SPECS = ("u4/g64/asym", "i8/row/sym", "u1/g64/asym", "fp8_e4m3/row/sym")
ROWS = (1, 2, 8, 16, 33, 129, 512, 513, 2048)


def product(spec: str, rows: int, outputs: int = 4096, inputs: int = 4096) -> Product:
    return Product(spec, rows, outputs, inputs, torch.bfloat16, not spec.startswith(("nf4", "fp8")))


@pytest.mark.parametrize("device", [H100, ADA, TURING], ids=["sm_90", "sm_89", "sm_75"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_formula_is_the_first_and_everything_fits(spec: str, device: Device) -> None:
    for rows in ROWS:
        for outputs, inputs in ((4096, 14336), (28672, 4096), (100, 128)):
            asked = product(spec, rows, outputs, inputs)
            found = candidates(asked, device)
            assert len(found) == len(set(found)) <= 70
            if fits(by_formula(asked, device), asked, device):
                assert found[0] == by_formula(asked, device)
            assert all(fits(choice, asked, device) for choice in found)


def test_other_ways_compete() -> None:
    def ways(spec: str, rows: int, device: Device = H100) -> set[str]:
        return {choice.way for choice in candidates(product(spec, rows), device)}

    assert ways("u4/g64/asym", 1) == ways("u4/g64/asym", 2) == {"dot"}  # what is fused around them is decided before
    assert ways("u4/g64/asym", 8) == {"few"}
    assert ways("u4/g64/asym", 16) == {"few", "mma"}
    assert ways("u4/g64/asym", 96) == {"mma", "wgmma"}
    assert ways("u4/g64/asym", 512) == {"mma", "wgmma", "dequantize"}
    assert ways("u4/g64/asym", 2048) == ways("i8/row/sym", 2048) == {"wgmma", "dequantize"}
    assert ways("u4/g64/asym", 128, ADA) == {"mma", "gemm", "dequantize"}
    assert ways("nf4/g64/sym", 8) == {"gemv", "gemm"}


@pytest.mark.parametrize(
    ("rows", "tile"),
    [
        (3, DotTile(outputs=4, split=4, warps=4)),  # two rows at most
        (4, FewTile(tokens=8, codes=32, stages=3, parts=1, split=2, warps=4, together=4)),  # less than is unpacked
        (4, FewTile(tokens=8, codes=192, stages=3, parts=1, split=2, warps=4, together=4)),  # no power of two
        (4, FewTile(tokens=8, codes=256, stages=3, parts=64, split=2, warps=4, together=4)),  # parts without inputs
        (16, MmaTile(16, codes=256, stages=2, splits=1, warps=4, together=2, warp_groups=True)),  # too few stages
        (16, MmaTile(16, codes=256, stages=20, splits=1, warps=4, together=2, warp_groups=True)),  # shared memory
        (16, MmaTile(16, codes=256, stages=4, splits=0, warps=4, together=2, warp_groups=True)),
        (256, WgmmaTile(256, stages=4, splits=1)),  # shared memory
        (256, WgmmaTile(256, stages=1, splits=1)),  # no step ahead
        (256, WgmmaTile(256, stages=3, splits=64)),  # parts without inputs
        (256, WgmmaTile(256, stages=3, splits=1, last=64)),
    ],
    ids=str,
)
def test_what_would_be_wrong_does_not_fit(rows: int, tile: DotTile | FewTile | MmaTile | WgmmaTile) -> None:
    way = {DotTile: "dot", FewTile: "few", MmaTile: "mma", WgmmaTile: "wgmma"}[type(tile)]
    asked = product("u4/g64/asym", rows)
    assert fits(
        Choice(way, tile_of(way, asked, H100)), asked._replace(rows=min(rows, 2 if way == "dot" else rows)), H100
    )
    assert not fits(Choice(way, tile), asked, H100)


@pytest.mark.parametrize(("rows", "tokens"), [(17, 32), (32, 32), (33, 40), (41, 48), (49, 64), (65, 72), (73, 80)])
def test_a_row_more_than_a_power_of_two_takes_eight(rows: int, tokens: int) -> None:
    tile = tile_of("mma", product("u4/g64/asym", rows), H100)
    assert isinstance(tile, MmaTile) and tile.tokens == tokens


def test_programs_side_by_side_are_no_more_than_there_are() -> None:
    """256 of 16 outputs on 132 multiprocessors are two on each, with room for a stage more."""
    few, more = (tile_of("few", product("u4/g64/asym", 4, outputs), H100) for outputs in (4096, 6144))
    assert isinstance(few, FewTile) and isinstance(more, FewTile)
    assert (few.together, few.stages, more.together, more.stages) == (2, 4, 3, 3)


def test_two_bits_in_float16_are_not_summed() -> None:
    asked = product("u2/g64/asym", 12)
    few = Choice("few", replace(tile_of("few", asked, H100)))
    assert fits(few, asked, H100)
    assert not fits(few, asked._replace(dtype=torch.float16), H100)


def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gluon, "INTERPRET", False)
    monkeypatch.setattr(_gluon, "gl", object())
    assert product_of("u4/g64/asym", 3, 10, 64).integers
    assert not product_of("u4/g8/asym", 3, 10, 72).integers
    assert not product_of("nf4/g64/sym", 3, 10, 64).integers
