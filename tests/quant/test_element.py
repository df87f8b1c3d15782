import pytest
import torch

from qcompile.errors import SpecError
from qcompile.quant.element import ELEMENTS, Element


def test_the_elements() -> None:
    unsigned = [f"u{bits}" for bits in range(1, 9)]
    signed = [f"i{bits}" for bits in range(2, 9)]
    floats = ["fp8_e4m3", "fp8_e5m2", "e8m0", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1", "fp4_bnb", "nf4", "iq4"]
    assert list(ELEMENTS) == [*unsigned, *signed, "ternary", *floats]
    assert [tag for tag in ELEMENTS if ELEMENTS[tag].is_float] == floats


@pytest.mark.parametrize("tag", ELEMENTS)
def test_tag_parses_back(tag: str) -> None:
    assert str(Element.parse(tag)) == tag


@pytest.mark.parametrize(
    ("tag", "bits", "levels", "offset"),
    [("u1", 1, 2, 0), ("u8", 8, 256, 0), ("i2", 2, 4, 2), ("i8", 8, 256, 128), ("ternary", 2, 3, 1)],
)
def test_bits_and_levels(tag: str, bits: int, levels: int, offset: int) -> None:
    element = Element.parse(tag)
    assert (element.bits, element.levels, element.offset) == (bits, levels, offset)


@pytest.mark.parametrize("tag", ["u0", "u9", "i1", "U4", "", "int4"])
def test_unknown_element_lists_the_known_ones(tag: str) -> None:
    with pytest.raises(SpecError, match=rf"unknown element '{tag}'; known: u1, .*ternary"):
        Element.parse(tag)


def test_small_floats() -> None:
    """OCP MX specification 1.0, tables 4 to 6."""
    e2m1, e2m3, e3m2 = (ELEMENTS[f"fp{tag}"].table for tag in ("4_e2m1", "6_e2m3", "6_e3m2"))
    assert e2m1 and e2m3 and e3m2
    assert e2m1[:8] == (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert (max(e2m3), e2m3[1], max(e3m2), e3m2[1]) == (7.5, 0.125, 28.0, 0.0625)
    for table in (e2m1, e2m3, e3m2):
        half = len(table) // 2
        assert table[half:] == tuple(-value for value in table[:half])


@pytest.mark.parametrize("tag", ["fp8_e4m3", "fp8_e5m2", "e8m0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_of_a_dtype(tag: str, dtype: torch.dtype) -> None:
    element, codes = ELEMENTS[tag], torch.arange(256).to(torch.uint8)
    assert element.dtype
    torch.testing.assert_close(
        element.decode(codes, dtype), codes.view(element.dtype).to(dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("tag", ["fp6_e3m2", "fp4_bnb", "nf4", "iq4"])
def test_lookup(tag: str) -> None:
    element = ELEMENTS[tag]
    codes = torch.randint(0, element.levels, (3, 5, 7), dtype=torch.uint8)
    want = [element.table[code] for code in codes.flatten()]  # type: ignore[index]
    assert torch.equal(element.decode(codes, torch.float64), torch.tensor(want, dtype=torch.float64).view(3, 5, 7))


@pytest.mark.parametrize("tag", ["nf4", "fp8_e4m3", "e8m0"])
def test_compiled(tag: str) -> None:
    element, codes = ELEMENTS[tag], torch.randint(0, 16, (4, 32), dtype=torch.uint8)
    compiled = torch.compile(lambda codes: element.decode(codes, torch.float32), fullgraph=True)
    assert torch.equal(compiled(codes), element.decode(codes, torch.float32))
