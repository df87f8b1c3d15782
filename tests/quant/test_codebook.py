from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qcompile.errors import FormatError
from qcompile.quant.codebook import CodebookTensor


def plain(rows: int = 6, columns: int = 16, height: int = 2, width: int = 4, entries: int = 10) -> CodebookTensor:
    """Two stages of tiles, a scale for each row of tiles."""
    down, across = -(-rows // height), columns // width
    codes = tuple(torch.randint(0, entries, (down, across), dtype=torch.uint8) for _ in range(2))
    books = tuple(torch.randn(1, entries, height, width).half() for _ in range(2))
    return CodebookTensor((rows, columns), codes, books, scale=torch.rand(down, 1).half())


def full() -> CodebookTensor:
    """Columns of three numbers in two sections, outliers before them, an order, and a scale and a shift by column."""
    return CodebookTensor(
        (7, 11),
        (torch.randint(0, 300, (3, 8)).to(torch.int16),),
        (torch.randn(2, 300, 3, 1),),
        torch.randint(0, 5, (4, 3), dtype=torch.uint8),
        torch.randn(1, 5, 2, 1),
        torch.rand(1, 11),
        torch.randn(1, 11),
        torch.randperm(11),
    )


def test_tiles() -> None:
    weight = plain()
    got = weight.dequantize(torch.float64)
    for row in range(6):
        for column in range(16):
            tile = row // 2, column // 4
            stages = zip(weight.codes, weight.books, strict=True)
            total = sum(float(book[0, int(codes[tile]), row % 2, column % 4]) for codes, book in stages)
            assert got[row, column] == total * float(weight.scale[row // 2, 0])  # type: ignore[index]
    assert weight.spec == "codebook/2x4/10+10"


def test_sections_outliers_order_and_columns() -> None:
    weight = full()
    assert weight.spec == "codebook/3x1/300/outliers(2x1/5)"
    got = weight.dequantize(torch.float64)
    assert weight.order is not None and weight.scale is not None and weight.shift is not None
    assert weight.outlier_codes is not None and weight.outlier_book is not None
    for row in range(7):
        for stored in range(11):
            if stored < 3:
                value = weight.outlier_book[0, int(weight.outlier_codes[row // 2, stored]), row % 2, 0]
            else:
                code = int(weight.codes[0][row // 3, stored - 3])
                value = weight.books[0][(stored - 3) // 4, code, row % 3, 0]
            column = int(weight.order[stored])
            want = float(value) * float(weight.scale[0, column]) + float(weight.shift[0, column])
            assert got[row, column] == pytest.approx(want, rel=1e-12)


def test_codes_of_sixteen_bits_have_no_sign() -> None:
    codes = torch.tensor([[-1, -32768, 5]], dtype=torch.int16)
    book = torch.arange(65536.0).reshape(1, -1, 1, 1)
    assert CodebookTensor((1, 3), (codes,), (book,)).dequantize().tolist() == [[65535, 32768, 5]]


@pytest.mark.parametrize("make", [plain, full])
def test_parts_make_it_again(make: Callable[[], CodebookTensor]) -> None:
    weight = make()
    again = CodebookTensor.from_parts(weight.shape, weight.parts())
    assert torch.equal(again.dequantize(), weight.dequantize()) and again.spec == weight.spec
    assert again.nbytes == sum(part.nbytes for part in weight.parts().values())
    assert weight.to("meta").dequantize().shape == weight.shape
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shape": (8, 16)}, "3 tiles of 2 rows are not 8 rows"),
        ({"shape": (6, 15)}, "0 outlier columns and 16 others are not 15"),
        ({"codes": (torch.zeros(3, 4, dtype=torch.uint8),)}, "1 codes and 2 codebooks"),
        ({"codes": (torch.full((3, 4), 10, dtype=torch.uint8),) * 2}, "a code is 10, and its codebook has 10 entries"),
        ({"codes": (torch.zeros(3, 4, dtype=torch.int64),) * 2}, "codes are torch.int64"),
        ({"codes": (torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(3, 5, dtype=torch.uint8))}, "do not fit"),
        ({"books": (torch.zeros(3, 10, 2, 4), torch.zeros(1, 10, 2, 4))}, "do not fit"),
        ({"scale": torch.zeros(4, 1)}, r"needs scale \(3, 1\) or \(1, 16\), got \(4, 1\)"),
        ({"shift": torch.zeros(3, 1)}, r"needs shift \(1, 16\), got \(3, 1\)"),
        ({"order": torch.zeros(16, dtype=torch.int64)}, "no permutation of its 16 columns"),
    ],
)
def test_what_does_not_fit(change: dict, says: str) -> None:
    weight = plain()
    fields = {"shape": weight.shape, "codes": weight.codes, "books": weight.books, "scale": weight.scale}
    with pytest.raises(FormatError, match=says):
        CodebookTensor(**{**fields, **change})
