import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import QCompileError, SpecError
from qcompile.quant.element import ELEMENTS, Element
from qcompile.quant.granularity import PerBlock, PerGroup, PerOutputGroup, PerRow, PerTensor
from qcompile.quant.spec import QSpec, Zero


def specs(depth: int) -> st.SearchStrategy[QSpec]:
    """Every spec that can be made, with scales and zero points nested `depth` deep."""
    sizes = st.integers(1, 512)
    ends = st.builds(PerTensor), st.builds(PerRow)
    granularity = st.one_of(*ends, sizes.map(PerGroup), sizes.map(PerOutputGroup), st.builds(PerBlock, sizes, sizes))
    side = st.none() | specs(depth - 1) if depth else st.none()

    def build(tag: str, zero: Zero, granularity, scale: QSpec | None, zero_spec: QSpec | None) -> QSpec:
        element = Element.parse(tag)
        if element.is_float or (element.offset and tag != "ternary"):
            zero = Zero.NONE
        return QSpec(element, granularity, zero, scale, zero_spec if zero.is_float else None)

    return st.builds(build, st.sampled_from(list(ELEMENTS)), st.sampled_from(Zero), granularity, side, side)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(specs(2))
def test_spelling_parses_back(spec: QSpec) -> None:
    assert QSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    "text",
    [
        "u4/g64/asym",
        "u1/o64/asym_int",
        "i8/row/sym",
        "ternary/tensor/sym",
        "ternary/g64/asym",
        "u4/g64/asym/scale(u8/o128/asym)/zero(u8/tensor/asym)",
        "i4/g32/sym/scale(u8/g16/asym/scale(i8/tensor/sym))",
        "u4/g32/shift/scale(u6/g8/sym)/zero(u6/g8/sym)",
        "fp8_e4m3/b128x128/sym",
        "fp4_e2m1/g16/sym/scale(fp8_e4m3/tensor/sym)",
        "fp4_e2m1/g32/sym/scale(e8m0/tensor/sym)",
    ],
)
def test_spelling(text: str) -> None:
    assert str(QSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a spec; a spec is element/granularity/zero, such as u4/g64/asym"),
        ("u4", "'u4' is not a spec"),
        ("u4/g64", "'u4/g64' is not a spec"),
        ("u4/g64/asym/", "'u4/g64/asym/' is not a spec"),
        ("u4/g64/asym/plain", "'u4/g64/asym/plain' is not a spec"),
        ("u4/g64/asym/scale(u8/tensor/asym", "is not a spec"),
        ("w4/g64/asym", "unknown element 'w4'; known: u1, "),
        ("U4/g64/asym", "unknown element 'U4'"),
        (" u4/g64/asym", "unknown element ' u4'"),
        ("u4/64/asym", "unknown granularity '64'; known: tensor, row, g<inputs>"),
        ("u4/g0/asym", "unknown granularity 'g0'"),
        ("u4/g٦٤/asym", "'u4/g٦٤/asym' is spelled 'u4/g64/asym'"),
        ("u4/g64/asymmetric", "unknown zero point 'asymmetric'; known: sym, asym, asym_int, shift"),
        ("nf4/g64/asym", "nf4 is a float and has no zero point; write nf4/g64/sym"),
        ("iq4/g32/shift", "iq4 is a float and has no zero point; write iq4/g32/sym"),
        ("i4/g64/asym", "i4 has no zero point; write u4/g64/asym"),
        ("i8/row/asym_int", "i8 has no zero point; write u8/row/asym_int"),
        ("u4/g64/asym_int/zero(u8/tensor/asym)", "zero(u8/tensor/asym) quantizes a float zero point, and asym_int has"),
        ("i4/g64/sym/zero(u8/tensor/asym)", "zero(u8/tensor/asym) quantizes a float zero point, and sym has none"),
        ("u4/g64/asym/scale(u9/tensor/asym)", "unknown element 'u9'"),
        (
            "u4/g64/asym/zero(u8/tensor/asym)/scale(u8/tensor/asym)",
            "is spelled 'u4/g64/asym/scale(u8/tensor/asym)/zero",
        ),
        ("u4/g64/asym/scale(u8/row/asym)/scale(u8/row/asym)", "is spelled 'u4/g64/asym/scale(u8/row/asym)'"),
    ],
)
def test_bad_spec_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        QSpec.parse(text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(alphabet="uigo0123456789/asym_int()zerocltn ", max_size=40))
def test_any_text_parses_or_is_a_spec_error(text: str) -> None:
    with contextlib.suppress(QCompileError):
        assert str(QSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "itemsize", "want"),
    [
        # A Llama-sized matrix: codes, 64 scales a row, 64 zero points a row.
        ("u4/g64/asym", 2, 4096 * (4096 // 2 + 64 * 2 + 64 * 2)),
        ("u4/g64/asym_int", 2, 4096 * (4096 // 2 + 64 * 2 + 64)),
        ("u3/g64/asym", 2, 4096 * (4096 * 3 // 8 + 64 * 2 + 64 * 2)),
        ("u1/o64/asym", 4, 4096 * (4096 // 8 + 64 * 4 + 64 * 4)),
        ("i8/row/sym", 2, 4096 * (4096 + 2)),
        ("ternary/tensor/sym", 2, 4096 * (4096 // 4) + 2),
        ("u4/g64/asym/zero(u8/tensor/asym)", 2, 4096 * (4096 // 2 + 64 * 2 + 64) + 2 + 2),
        ("fp8_e4m3/b128x128/sym", 4, 4096 * 4096 + 32 * 32 * 4),
        # GGUF's Q4_K: 144 bytes for 256 weights.
        ("u4/g32/shift/scale(u6/g8/sym)/zero(u6/g8/sym)", 2, 4096 * 4096 // 256 * 144),
    ],
)
def test_bytes(text: str, itemsize: int, want: int) -> None:
    assert QSpec.parse(text).nbytes(4096, 4096, itemsize) == want
