"""Which scales and zero points of a row are copied; what linear_dot makes of them is its own test's."""

import pytest
import torch

from qcompile.kernels._row_sides import copied_bytes
from qcompile.kernels._tuning import DotTile
from qcompile.kernels._weight import Weight
from qcompile.quant.packing import row_bytes
from qcompile.quant.spec import QSpec, Zero

TILE = DotTile(16, 4, 4)


def weight(spec: str, columns: int, beyond: int = 0) -> Weight:
    """Of four rows, each with scales `beyond` its own."""
    parsed = QSpec.parse(spec)
    rows, groups = parsed.scale_shape(4, columns)
    scale = torch.ones(rows, groups + beyond).half()[:, :groups]
    zero = {Zero.FLOAT: scale, Zero.INT: torch.ones(rows, groups, dtype=torch.uint8)}.get(parsed.zero)
    data = torch.zeros(4, row_bytes(columns, parsed.element.bits), dtype=torch.uint8)
    return Weight.of(data, scale, zero, spec, columns)


@pytest.mark.parametrize(
    ("spec", "columns", "tile", "bytes_of_a_row"),
    [
        ("u4/g64/asym", 4096, TILE, 64 * 2 * 2),
        ("i4/g128/sym", 4096, TILE, 32 * 2),
        ("u4/g64/asym_int", 4096, TILE, 64 * 2 + 64),
        ("u3/g64/asym", 4096, DotTile(16, 4, 4, words=1), 64 * 2 * 2),
        ("u4/g64/asym", 14336, DotTile(4, 8, 8, 4, 2), 256 * 2 * 2),  # two parts
        ("u4/g64/asym", 1536, DotTile(4, 2, 4), 32 * 2 * 2),
    ],
)
def test_whole_chunks_are_copied(spec: str, columns: int, tile: DotTile, bytes_of_a_row: int) -> None:
    assert copied_bytes(weight(spec, columns), tile) == bytes_of_a_row


@pytest.mark.parametrize(
    ("spec", "columns"),
    [
        ("i4/row/sym", 4096),
        ("u4/g48/asym", 4608),  # no power of two
        ("u4/g64/asym", 1600),  # 50 bytes a row
        ("u4/g1024/asym", 8192),  # the threads of a part have less than 16 bytes
    ],
)
def test_others_are_read(spec: str, columns: int) -> None:
    assert copied_bytes(weight(spec, columns), TILE) == 0


def test_rows_that_are_no_whole_chunks_apart_are_read() -> None:
    assert copied_bytes(weight("i4/g64/sym", 4096, beyond=1), TILE) == 0
