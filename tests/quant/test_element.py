import pytest

from qcompile.errors import SpecError
from qcompile.quant.element import ELEMENTS, Element


def test_the_elements() -> None:
    unsigned = [f"u{bits}" for bits in range(1, 9)]
    signed = [f"i{bits}" for bits in range(2, 9)]
    assert list(ELEMENTS) == [*unsigned, *signed, "ternary"]


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
