"""Weights that are looked up in codebooks."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ops.registry import op_with_fake
from qcompile.quant import codebook


def _empty(
    codes: list[Tensor],
    books: list[Tensor],
    outlier_codes: Tensor | None,
    outlier_book: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    order: Tensor | None,
    spec: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return codes[0].new_empty(shape, dtype=dtype)


@op_with_fake(_empty)
def dequantize_codebook(
    codes: list[Tensor],
    books: list[Tensor],
    outlier_codes: Tensor | None,
    outlier_book: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    order: Tensor | None,
    spec: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """The float weight of logical `shape` whose tiles are sums of codebook entries, see CodebookTensor.

    `spec` is for people.
    """
    return codebook.dequantize(codes, books, outlier_codes, outlier_book, scale, shift, order, shape, dtype)
