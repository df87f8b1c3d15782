"""Codes out of the words that formats pack them into."""

from __future__ import annotations

import torch
from torch import Tensor


def fields(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The codes of integer words, low bits first along the last dimension: (…, words) → (…, words * codes) uint8.

    Words of w bits hold w // bits codes, and bits left over at the top are unused. `order` says which field holds the
    first, second, … code of a word.
    """
    count = words.dtype.itemsize * 8 // bits
    shifts = [bits * field for field in (order or range(count))]
    # Shifting a signed word drags its sign in from the left, above the field that the mask keeps.
    codes = [((words >> shift) & (2**bits - 1)).to(torch.uint8) for shift in shifts]
    return torch.stack(codes, dim=-1).flatten(-2)


def stream(words: Tensor, bits: int, count: int) -> Tensor:
    """`count` codes of a continuous bit stream along the last dimension, low bits first, over the bounds of words."""
    width = words.dtype.itemsize * 8
    groups = -(-count * bits // (width * bits))  # `bits` words hold exactly `width` codes
    padded = torch.nn.functional.pad(words, (0, groups * bits - words.shape[-1]))
    unit = padded.unflatten(-1, (groups, bits)).to(torch.int64) & (2**width - 1)
    codes = []
    for code in range(width):
        word, shift = divmod(code * bits, width)
        value = unit[..., word] >> shift
        if shift + bits > width:
            value = value | unit[..., word + 1] << (width - shift)
        codes.append((value & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]
