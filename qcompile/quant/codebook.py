"""CodebookTensor: a weight of tiles looked up in codebooks (AQLM arXiv:2401.06118, VPTQ arXiv:2409.17066)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import FormatError
from qcompile.quant.tensor import reorder

# How many entries codes of a dtype can name. int16 holds 16 bits, read without a sign.
ENTRIES = {torch.uint8: 1 << 8, torch.int16: 1 << 16, torch.int32: 1 << 31}


@dataclass(frozen=True)
class CodebookTensor:
    """A weight whose tiles are sums of codebook entries, one of each stage.

    shape          (out_features, in_features)
    codes          a stage each: (tiles down, tiles across) of a dtype in ENTRIES; tiles may reach below the last row
    books          a stage each: floating (sections, entries, height, width); the tiles of each of `sections` equal runs
                   of columns have entries of their own
    outlier_codes  like codes, for columns that lie before all others, or None; `outlier_book` is their one codebook
    scale          floating (tiles down, 1), for rows of tiles, or (1, in_features), for columns of the weight, or None
    shift          floating (1, in_features), added after scaling, or None
    order          int64 (in_features,) or None: stored column j is column order[j] of the weight

    Raises FormatError when shapes or dtypes do not fit, or codes name no entry; the message names both sides.
    """

    shape: tuple[int, int]
    codes: tuple[Tensor, ...]
    books: tuple[Tensor, ...]
    outlier_codes: Tensor | None = None
    outlier_book: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    order: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.shape
        outliers = 0
        if self.outlier_codes is not None and self.outlier_book is not None:
            outliers = _check_tiles(self, [self.outlier_codes], [self.outlier_book], rows)
        main = _check_tiles(self, self.codes, self.books, rows)
        if outliers + main != columns:
            raise FormatError(f"{self._what}: {outliers} outlier columns and {main} others are not {columns}")
        down = self.codes[0].shape[0]
        for name, fits in (("scale", [(down, 1), (1, columns)]), ("shift", [(1, columns)]), ("order", [(columns,)])):
            side = getattr(self, name)
            if side is not None and tuple(side.shape) not in fits:
                raise FormatError(f"{self._what} needs {name} {' or '.join(map(str, fits))}, got {tuple(side.shape)}")
        places = torch.arange(columns, device=self.data.device)
        if self.order is not None and not self.order.is_meta and not torch.equal(self.order.sort().values, places):
            raise FormatError(f"{self._what}: order is no permutation of its {columns} columns")

    @property
    def spec(self) -> str:
        """How it is stored: `codebook/1x8/256+256` is tiles of one row and eight columns, two codebooks of 256."""
        text = _tiles(self.books)
        return text if self.outlier_book is None else f"{text}/outliers({_tiles([self.outlier_book])[9:]})"

    @property
    def _what(self) -> str:
        return f"{self.spec} of shape {tuple(self.shape)}"

    @property
    def data(self) -> Tensor:
        """The codes of the first stage."""
        return self.codes[0]

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def parts(self) -> dict[str, Tensor]:
        """The stored pieces by name, without absent ones."""
        parts: dict[str, Tensor] = {}
        for stage, (codes, book) in enumerate(zip(self.codes, self.books, strict=True)):
            parts |= {f"data{stage or ''}": codes, f"book{stage or ''}": book}
        sides = ("outlier_codes", "outlier_book", "scale", "shift", "order")
        return parts | {name: side for name in sides if (side := getattr(self, name)) is not None}

    @staticmethod
    def from_parts(shape: tuple[int, int], parts: Mapping[str, Tensor]) -> CodebookTensor:
        """Inverse of `parts`."""
        codes, books = stages(parts)
        rest = {name: part for name, part in parts.items() if not name.startswith(("data", "book"))}
        return CodebookTensor(shape, tuple(codes), tuple(books), **rest)

    def to(self, device: torch.device | str) -> CodebookTensor:
        """The same tensor on another device."""
        return CodebookTensor.from_parts(self.shape, {name: part.to(device) for name, part in self.parts().items()})

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in its logical shape; computed in float32 (float64 for a float64 result), rounded once."""
        return dequantize(
            self.codes,
            self.books,
            self.outlier_codes,
            self.outlier_book,
            self.scale,
            self.shift,
            self.order,
            self.shape,
            dtype,
        )


def stages(parts: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The codes and the codebooks among the pieces of a CodebookTensor."""
    numbers = [stage or "" for stage in range(len(parts)) if f"data{stage or ''}" in parts]
    return [parts[f"data{number}"] for number in numbers], [parts[f"book{number}"] for number in numbers]


def _tiles(books: Sequence[Tensor]) -> str:
    return f"codebook/{books[0].shape[-2]}x{books[0].shape[-1]}/{'+'.join(str(book.shape[1]) for book in books)}"


def _check_tiles(of: CodebookTensor, codes: Sequence[Tensor], books: Sequence[Tensor], rows: int) -> int:
    """The columns that the tiles make up."""
    if not codes or len(codes) != len(books) or any(book.dim() != 4 for book in books):
        raise FormatError(f"a weight of shape {tuple(of.shape)} has {len(codes)} codes and {len(books)} codebooks")
    down, across = codes[0].shape
    height, width = books[0].shape[2:]
    if not down * height - height < rows <= down * height:
        raise FormatError(f"{of._what}: {down} tiles of {height} rows are not {rows} rows")
    for each, book in zip(codes, books, strict=True):
        sections, entries = book.shape[:2]
        if each.shape != (down, across) or book.shape[2:] != (height, width) or across % sections:
            raise FormatError(
                f"{of._what}: codes {tuple(each.shape)} do not fit a codebook {tuple(book.shape)}, "
                f"or another stage's {(down, across)} and {tuple(books[0].shape)}"
            )
        if each.dtype not in ENTRIES or not book.dtype.is_floating_point:
            raise FormatError(f"{of._what}: codes are {each.dtype} and codebooks {book.dtype}")
        if entries < ENTRIES[each.dtype] and not each.is_meta and each.numel():
            largest = int(indices(each).max())
            if largest >= entries or int(indices(each).min()) < 0:
                raise FormatError(f"{of._what}: a code is {largest}, and its codebook has {entries} entries")
    return across * width


def indices(codes: Tensor) -> Tensor:
    """Codes as int32 numbers of entries."""
    return codes.to(torch.int32) & 0xFFFF if codes.dtype == torch.int16 else codes.to(torch.int32)


def dequantize(
    codes: Sequence[Tensor],
    books: Sequence[Tensor],
    outlier_codes: Tensor | None,
    outlier_book: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    order: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The numbers in float32 (float64 for float64), then rounded to `dtype`."""
    rows, compute = shape[0], torch.float64 if dtype == torch.float64 else torch.float32
    weight = _look_up(codes, books, compute)[:rows]
    by_rows = scale is not None and scale.shape[0] == codes[0].shape[0] and scale.shape[1] == 1
    if scale is not None and by_rows:
        weight = weight * scale.to(compute).repeat_interleave(books[0].shape[2], 0)[:rows]
    if outlier_codes is not None and outlier_book is not None:
        weight = torch.cat([_look_up([outlier_codes], [outlier_book], compute)[:rows], weight], dim=1)
    if order is not None:
        weight = reorder(weight, order)
    if scale is not None and not by_rows:
        weight = weight * scale.to(compute)
    if shift is not None:
        weight = weight + shift.to(compute)
    return weight.to(dtype).contiguous()


def _look_up(codes: Sequence[Tensor], books: Sequence[Tensor], compute: torch.dtype) -> Tensor:
    """The sums of the stages' entries, laid out as a matrix."""
    down, across = codes[0].shape
    total = None
    for each, book in zip(codes, books, strict=True):
        sections, entries, height, width = book.shape
        first = torch.arange(sections, device=each.device, dtype=torch.int32) * entries
        places = indices(each) + first.repeat_interleave(across // sections)
        tiles = book.reshape(sections * entries, height * width).index_select(0, places.reshape(-1)).to(compute)
        total = tiles if total is None else total + tiles
    assert total is not None
    height, width = books[0].shape[2:]
    return total.reshape(down, across, height, width).permute(0, 2, 1, 3).reshape(down * height, across * width)
